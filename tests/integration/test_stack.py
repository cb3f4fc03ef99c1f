"""One real stack on free ports: started twice at once, broken in several ways, mended and ended.

The tests share the stack and run in the order of the file; each leaves it running but the last.
"""

import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra import stack
from tasks.errors import StageError

pytestmark = pytest.mark.timeout(300)
ROOT = Path(stack.__file__).parents[1]
PREFECT = Path(sys.executable).with_name("prefect")
# A second process in a session of its own, as ranks are started by a launcher.
FLOW = """
import subprocess, time
from prefect import flow

@flow
def tiny(seconds: float = 0) -> None:
    if seconds:
        subprocess.Popen(["sleep", str(seconds)], start_new_session=True)
    time.sleep(seconds)
"""
DEPLOYMENTS = """
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: "{{ $NIGHTSHIFT_CHECKOUT }}"
deployments:
  - name: prod
    entrypoint: flow.py:tiny
    work_pool: {name: nightshift}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
  - name: beside
    entrypoint: flow.py:tiny
    work_pool: {name: nightshift, work_queue_name: other}
"""
# A shell that starts `make run &` ignores SIGINT, and so do the processes below it.
UP = """
import logging, signal
from infra import stack
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.basicConfig(level=logging.INFO)
stack.up()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one deployment, where two `up` at once have started the stack."""
    folder = tmp_path_factory.mktemp("night shift")
    (folder / "flow.py").write_text(FLOW)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("NIGHTSHIFT_HOME", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        for (variable, _), port in zip(stack.PORTS.values(), free_ports(2), strict=True):
            patch.setenv(variable, str(port))
        try:
            command = [sys.executable, "-c", UP]
            ups = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
            told = [up.communicate(timeout=200)[1] for up in ups]
            assert [up.returncode for up in ups] == [0, 0], "\n\n".join(told)
            yield folder
        finally:
            stack.down()
            for process in processes(folder):
                process.kill()


@pytest.fixture
def running(folder: Path) -> stack.Stack:
    """The stack of `folder`."""
    assert Path.cwd() == folder
    found = stack.find_stack()
    assert found is not None
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_.getsockname()[1] for open_ in sockets]
    for open_ in sockets:
        open_.close()
    return ports


def processes(folder: Path) -> list[psutil.Process]:
    """Every process that was started by the stack or below it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NIGHTSHIFT_HOME") == str(folder / ".nightshift"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def pids() -> dict[str, int | None]:
    return {service: pid for service, pid, _, _ in stack.status()}


def kill(pid: int | None) -> None:
    process = psutil.Process(pid)
    process.kill()
    process.wait(timeout=30)


def prefect(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A prefect command as typed in a fresh shell: nothing but PATH and HOME is set."""
    return subprocess.run(
        [PREFECT, *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def submit(folder: Path, *arguments: str) -> str:
    done = prefect(folder, "deployment", "run", "tiny/prod", *arguments)
    found = re.search(r"UUID: (\S+)", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1]


def state_of(running: stack.Stack, run: str) -> tuple[str, str]:
    answer = httpx.get(f"{running.prefect_url}/flow_runs/{run}", timeout=30, trust_env=False)
    state: dict[str, Any] = answer.json()["state"]
    return state["type"], state["message"]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def start_long_run(folder: Path, running: stack.Stack) -> str:
    run = submit(folder, "--param", "seconds=600")
    wait_until(lambda: state_of(running, run)[0] == "RUNNING")
    wait_until(lambda: "sleep" in [process.name() for process in processes(folder)])
    return run


def test_two_ups_at_once_start_one_stack(folder: Path) -> None:
    assert [healthy for *_, healthy in stack.status()] == [True, True, True]
    commands = [" ".join(process.cmdline()) for process in processes(folder)]
    for service in ("prefect server start", "mlflow server", "prefect worker start"):
        assert len([command for command in commands if service in command]) == 1


def test_a_second_up_keeps_the_processes_and_the_automation(running: stack.Stack) -> None:
    before = pids()
    assert stack.up() == running
    assert pids() == before
    url = f"{running.prefect_url}/automations/filter"
    automations = httpx.post(url, json={}, timeout=30, trust_env=False).json()
    assert [found["name"] for found in automations] == ["crash-zombie-flows"]


def test_the_servers_listen_on_loopback_only_and_know_their_names(folder: Path) -> None:
    listening = [
        connection.laddr[0]
        for process in processes(folder)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    found = stack.find_stack()
    assert found is not None
    url = f"{found.mlflow_url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    for host, code in (
        ("localhost", 200),
        (f"localhost:{found.mlflow_port}", 200),
        ("127.0.0.1", 200),
        ("elsewhere.example", 403),
    ):
        assert httpx.get(url, headers={"Host": host}, trust_env=False).status_code == code


def test_a_plain_prefect_command_reaches_the_stack(folder: Path) -> None:
    done = prefect(folder, "deployment", "run", "tiny/prod", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Flow run finished successfully" in done.stdout
    assert not (folder / ".prefect").exists()


def test_the_worker_obeys_although_its_starter_ignored_sigint() -> None:
    worker = pids()["worker"]
    status = Path(f"/proc/{worker}/status").read_text()
    ignored = int(re.findall(r"SigIgn:\s*(\w+)", status)[0], 16)
    assert ignored & (1 << (signal.SIGINT - 1)) == 0


def test_a_broken_deployment_is_reported_with_its_reason(folder: Path) -> None:
    (folder / "prefect.yaml").write_text(DEPLOYMENTS.replace("flow.py:tiny", "flow.py:huge"))
    with pytest.raises(StageError, match="Flow function with name 'huge' not found"):
        stack.up()
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    stack.up()


def test_a_server_that_was_killed_comes_back_under_the_worker(folder: Path, running: stack.Stack) -> None:
    before = pids()
    run = start_long_run(folder, running)
    kill(before["prefect"])
    assert stack.up() == running
    assert pids()["worker"] == before["worker"]
    assert pids()["prefect"] != before["prefect"]
    assert state_of(running, run)[0] == "RUNNING"


def test_a_run_waits_for_those_of_its_own_queue_only(folder: Path, running: stack.Stack) -> None:
    (active,) = stack._active_runs(running)
    assert prefect(folder, "deployment", "run", "tiny/beside", "--watch").returncode == 0
    assert state_of(running, active["id"])[0] == "RUNNING"
    queues = httpx.post(
        f"{running.prefect_url}/work_pools/{stack.POOL}/queues/filter", json={}, trust_env=False
    )
    limits = {queue["name"]: queue["concurrency_limit"] for queue in queues.json()}
    assert limits == {"default": 1, "other": 1}


def test_the_runs_of_a_killed_worker_are_crashed_and_free_their_slot(
    folder: Path, running: stack.Stack
) -> None:
    run = stack._active_runs(running)[0]["id"]
    kill(pids()["worker"])
    stack.up()
    assert state_of(running, run) == ("CRASHED", "the worker was gone when the stack came up")
    names = [process.name() for process in processes(folder)]
    assert "sleep" not in names
    assert prefect(folder, "deployment", "run", "tiny/prod", "--watch").returncode == 0


def test_down_cancels_the_run_and_leaves_no_process(folder: Path, running: stack.Stack) -> None:
    active = start_long_run(folder, running)
    queued = submit(folder)
    assert stack.down() == ["worker", "mlflow", "prefect"]
    assert processes(folder) == []
    assert not (folder / "prefect.toml").exists()
    assert json.loads((folder / ".nightshift" / "stack.json").read_text()) == {}
    with sqlite3.connect(folder / ".nightshift" / "prefect" / "prefect.db") as database:
        states = dict(database.execute("SELECT id, state_type FROM flow_run").fetchall())
        paused = database.execute("SELECT is_paused FROM work_pool").fetchall()
    database.close()
    assert states[active] == "CANCELLED"
    assert states[queued] == "SCHEDULED"
    assert paused == [(0,)]
    assert stack.down() == []
