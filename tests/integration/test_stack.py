"""One real stack on free ports: started twice at once, broken in several ways, repaired and stopped.

The tests share the stack and run in file order; all but the last leave it running.
"""

import json
import platform
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from infra.cli import doctor
from infra.local import notify, runs, services, stack
from infra.local.settings import Stack
from nightshift.core.errors import StageError
from nightshift.core.files import write_json
from nightshift.pipeline import leases
from tests.helpers.checkouts import ROOT
from tests.helpers.processes import command_line
from tests.helpers.webhook import create_webhook, receiving

pytestmark = pytest.mark.timeout(300)
PREFECT = Path(sys.executable).with_name("prefect")
# Starts a second process in its own session, as a launcher starts ranks, and says what it does, as stages do.
FLOW = """
import subprocess, time
from prefect import flow, get_run_logger
from prefect.states import Completed
from flows.nights import describe_missed_night

@flow
def tiny(seconds: float = 0):
    if missed := describe_missed_night():
        return Completed(name="Missed", message=missed)
    if seconds:
        subprocess.Popen(["sleep", str(seconds)], start_new_session=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        get_run_logger().info("working")
        print("working", flush=True)
        time.sleep(0.5)
"""
DEPLOYMENTS = """
deployments:
  - name: prod
    entrypoint: flow.py:tiny
    work_pool: {name: nightshift}
  - name: beside
    entrypoint: flow.py:tiny
    work_pool: {name: nightshift, work_queue_name: other}
  - name: local
    entrypoint: JANITOR:janitor
    work_pool: {name: nightshift, work_queue_name: janitor}
""".replace("JANITOR", str(ROOT / "flows" / "janitor.py"))
# A shell that runs `make run &` ignores SIGINT, and the processes below it inherit that.
UP = """
import logging, signal
from infra.local import stack
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.basicConfig(level=logging.INFO)
stack.up()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create a folder in which two concurrent `up` calls have started the stack."""
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
            errors = [up.communicate(timeout=200)[1] for up in ups]
            assert [up.returncode for up in ups] == [0, 0], "\n\n".join(errors)
            yield folder
        finally:
            stack.down()
            for process in processes(folder):
                process.kill()


@pytest.fixture
def running(folder: Path) -> Stack:
    """Return the stack of `folder`."""
    assert Path.cwd() == folder
    return stack.read_stack(folder / ".nightshift")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_.getsockname()[1] for open_ in sockets]
    for open_ in sockets:
        open_.close()
    return ports


def processes(folder: Path) -> list[psutil.Process]:
    """Return every process started by the stack, at any depth."""
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


def lose(service: str) -> None:
    """End a service, and the keeper, which would start it again."""
    before = pids()
    if before["keeper"]:
        kill(before["keeper"])
    kill(before[service])


def kill(pid: int | None) -> None:
    process = psutil.Process(pid)
    process.kill()
    process.wait(timeout=30)


def prefect(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a prefect command as in a fresh shell, with only PATH and HOME set."""
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


def nights(running: Stack, deployment: str) -> list[dict[str, Any]]:
    """Return the runs that the schedule of a deployment created."""
    body = {"deployments": {"id": {"any_": [deployment]}}}
    return [run for run in running.prefect("POST", "/flow_runs/filter", body) if run["auto_scheduled"]]


def completed(running: Stack, deployment: str) -> list[datetime]:
    """Return the planned starts of those that ran, and did not end as missed."""
    done = [run for run in nights(running, deployment) if run["state_name"] == "Completed"]
    return [datetime.fromisoformat(run["expected_start_time"]) for run in done]


def state_of(running: Stack, run: str) -> tuple[str, str]:
    state: dict[str, Any] = running.prefect("GET", f"/flow_runs/{run}")["state"]
    return state["type"], state["message"]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def long_run(running: Stack) -> str:
    """Return the id of the run in progress."""
    (run,) = [run["id"] for run in runs.active_runs(running) if run["parameters"].get("seconds")]
    return str(run)


def run_processes(running: Stack, run: str) -> list[psutil.Process]:
    return [process for one, process in runs.run_processes(running.state_dir) if one == run]


def start_long_run(folder: Path, running: Stack) -> str:
    run = submit(folder, "--param", "seconds=600")
    wait_until(lambda: state_of(running, run)[0] == "RUNNING")
    wait_until(lambda: "sleep" in [process.name() for process in processes(folder)])
    return run


def test_concurrent_ups_start_one_stack(folder: Path) -> None:
    assert [healthy for *_, healthy in stack.status()] == [True] * 4
    commands = [" ".join(command_line(process)) for process in processes(folder)]
    for service in ("infra.local.prefect_server", "mlflow server", "prefect worker start"):
        assert len([command for command in commands if service in command]) == 1


def test_a_second_up_keeps_the_processes_and_the_automation(running: Stack) -> None:
    before, automations = pids(), running.prefect("POST", "/automations/filter", {})
    assert stack.up() == running
    assert pids() == before
    assert [found["name"] for found in automations] == ["look-after-silent-runs"]
    assert running.prefect("POST", "/automations/filter", {}) == automations


def test_a_schedule_creates_runs_and_the_worker_executes_them(folder: Path, running: Stack) -> None:
    scheduled = DEPLOYMENTS.replace("- name: beside", "- name: beside\n    schedules: [{interval: 5}]")
    (folder / "prefect.yaml").write_text(scheduled)
    stack.up()
    deployment = running.prefect("GET", "/deployments/name/tiny/beside")["id"]
    wait_until(lambda: bool(completed(running, deployment)), seconds=120)
    assert all(one.endswith(" beside") for one in stack.next_runs())
    # prefect.yaml is the whole truth: what it no longer has ends.
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    stack.up()
    assert running.prefect("GET", f"/deployments/{deployment}/schedules") == []
    assert stack.next_runs() == []


def test_of_several_nights_that_are_due_only_the_newest_runs(folder: Path, running: Stack) -> None:
    pool = f"/work_pools/{runs.POOL}"
    running.prefect("PATCH", pool, {"is_paused": True})
    scheduled = DEPLOYMENTS.replace("- name: beside", "- name: beside\n    schedules: [{interval: 20}]")
    (folder / "prefect.yaml").write_text(scheduled)
    start = datetime.now(UTC)
    stack.up()
    deployment = running.prefect("GET", "/deployments/name/tiny/beside")["id"]

    def late() -> list[tuple[datetime, str]]:
        planned = {
            run["id"]: datetime.fromisoformat(run["expected_start_time"])
            for run in nights(running, deployment)
            # The worker may still run one of another test.
            if run["state_type"] == "SCHEDULED"
        }
        return sorted((at, run) for run, at in planned.items() if start < at < datetime.now(UTC))

    wait_until(lambda: len(late()) == 3, seconds=120)
    *older, (_, newest) = late()
    running.prefect("PATCH", pool, {"is_paused": False})
    for planned, run in older:
        wait_until(lambda run=run: state_of(running, run)[0] == "COMPLETED", 120)  # type: ignore[misc]
        found = running.prefect("GET", f"/flow_runs/{run}")["state"]
        assert found["name"] == "Missed"
        assert f"the night of {planned.astimezone():%Y-%m-%d %H:%M} could not start" in found["message"]
    wait_until(lambda: state_of(running, newest)[0] == "COMPLETED", 120)
    # It ran, unless yet another night was due when it started; then that one does.
    wait_until(lambda: any(planned > older[-1][0] for planned in completed(running, deployment)), 120)
    assert not {planned for planned, _ in older} & set(completed(running, deployment))
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    stack.up()


def test_a_block_tells_how_a_night_ended(
    folder: Path, running: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "FLOW", "tiny")
    (folder / "params.yaml").write_text("nightly: {notify: [custom-webhook/ops, custom-webhook/none]}")
    try:
        with receiving() as (url, received):
            create_webhook(running, "ops", url)
            stack.up()
            assert prefect(folder, "deployment", "run", "tiny/prod", "--watch").returncode == 0
            wait_until(lambda: bool(received), 30)
            assert len(received) == 1
            assert re.search(r"Nightshift: \S+: Completed ", received[0])
            assert f"{running.prefect_ui}/runs/flow-run/" in received[0]
        # An address that does not answer changes nothing for the night.
        assert prefect(folder, "deployment", "run", "tiny/prod", "--watch").returncode == 0
    finally:
        (folder / "params.yaml").unlink()
        stack.up()
    assert not [
        one for one in running.prefect("POST", "/automations/filter", {}) if "tell-how" in one["name"]
    ]


def test_the_servers_listen_on_loopback_only(folder: Path) -> None:
    listening = [
        connection.laddr[0]
        for process in processes(folder)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}


# Headers that a page of another site can make a browser send: its own origin, or another host name.
PAGES = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Host": "evil.example", "Origin": "http://evil.example"},
    {"Host": "evil.example"},
]


@pytest.mark.parametrize("headers", PAGES)
def test_a_web_page_cannot_call_prefect(headers: dict[str, str], running: Stack) -> None:
    auth = tuple(running.auth_string.split(":"))
    with httpx.Client(base_url=running.prefect_url, trust_env=False, headers=headers) as page:
        for method, path in (
            ("GET", "/health"),
            ("GET", "/csrf-token?client=x"),
            ("POST", "/flow_runs/filter"),
        ):
            answer = page.request(method, path, auth=auth, json={} if method == "POST" else None)
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
    with pytest.raises(InvalidStatus, match="HTTP 403"):
        open_socket(running, headers)


def open_socket(running: Stack, headers: dict[str, str]) -> None:
    """Open Prefect's event stream as a web page would."""
    host = {"Host": f"127.0.0.1:{running.prefect_port}"} | headers
    address = ("127.0.0.1", running.prefect_port)
    url = f"ws://{host.pop('Host')}/api/events/out"
    with socket.create_connection(address) as connection:
        connect(url, sock=connection, additional_headers=host, subprotocols=["prefect"]).close()


def test_prefect_requires_the_auth_string(running: Stack) -> None:
    assert running.auth_file.stat().st_mode & 0o777 == 0o600
    assert Path("prefect.toml").stat().st_mode & 0o777 == 0o600
    with httpx.Client(base_url=running.prefect_url, trust_env=False) as page:
        assert page.get("/csrf-token?client=x").status_code == 401
        assert page.post("/flow_runs/filter", json={}).status_code == 403  # no token
        assert page.post("/flow_runs/filter", json={}, auth=("nightshift", "guessed")).status_code == 403


@pytest.mark.parametrize("variable", ["command", "env", "working_dir", "stream_output"])
def test_a_run_cannot_set_its_command(variable: str, folder: Path, running: Stack) -> None:
    planted = folder / f"planted-{variable}"
    value = {
        "command": f"touch {planted}",
        "env": {"BASH_ENV": str(planted)},
        "working_dir": str(planted),
        "stream_output": False,
    }[variable]
    deployment = running.prefect("GET", "/deployments/name/tiny/beside")["id"]
    with pytest.raises(StageError, match="HTTP Error 4"):
        body = {"job_variables": {variable: value}}
        running.prefect("POST", f"/deployments/{deployment}/create_flow_run", body)
    pool = running.prefect("GET", f"/work_pools/{runs.POOL}")["base_job_template"]
    assert pool["variables"]["properties"] == {}
    assert "{{" not in json.dumps(pool["job_configuration"])


def test_mlflow_checks_host_and_origin(running: Stack) -> None:
    names = {"localhost": 200, f"localhost:{running.mlflow_port}": 200, "127.0.0.1": 200}
    for path in ("api", "ajax-api"):
        url = f"{running.mlflow_url}/{path}/2.0/mlflow/experiments"
        for host, code in {**names, "elsewhere.example": 403}.items():
            answer = httpx.get(f"{url}/get?experiment_id=0", headers={"Host": host}, trust_env=False)
            assert answer.status_code == code
        page = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
        answer = httpx.post(f"{url}/create", content='{"name": "planted"}', headers=page, trust_env=False)
        assert answer.status_code == 403
        found = httpx.get(f"{url}/search?max_results=10", trust_env=False).json()["experiments"]
        assert [one["name"] for one in found] == ["Default"]


def test_a_plain_prefect_command_reaches_the_stack(folder: Path) -> None:
    done = prefect(folder, "deployment", "run", "tiny/prod", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Flow run finished successfully" in done.stdout
    assert not (folder / ".prefect").exists()


def test_the_worker_does_not_inherit_an_ignored_sigint() -> None:
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


def test_a_run_survives_an_outage_of_its_server(folder: Path, running: Stack) -> None:
    before = pids()
    run = submit(folder, "--param", "seconds=20")
    wait_until(lambda: state_of(running, run)[0] == "RUNNING")
    lose("prefect")
    time.sleep(25)  # the flow ends meanwhile and cannot report it
    assert stack.up() == running
    assert pids()["worker"] == before["worker"]
    assert pids()["prefect"] != before["prefect"]
    wait_until(lambda: state_of(running, run)[0] == "COMPLETED")


def test_a_run_completes_if_its_server_dies_during_startup(folder: Path, running: Stack) -> None:
    run = submit(folder)
    wait_until(lambda: state_of(running, run)[0] == "PENDING")
    lose("prefect")
    time.sleep(10)
    stack.up()
    wait_until(lambda: state_of(running, run)[0] == "COMPLETED")


def test_the_logs_contain_no_unexplained_errors(running: Stack) -> None:
    assert stack.problems() == {}


def test_the_doctor_finds_nothing_wrong_with_the_running_stack(running: Stack) -> None:
    checks = (doctor.check_services, doctor.check_queues, doctor.check_runs, doctor.check_messages)
    assert [fault for one in checks for fault in one(running)] == []
    assert [*doctor.check_state(), *doctor.check_clock(), *doctor.check_databases()] == []


def test_a_run_waits_only_for_runs_of_its_queue(folder: Path, running: Stack) -> None:
    active = {"id": start_long_run(folder, running)}
    assert prefect(folder, "deployment", "run", "tiny/beside", "--watch").returncode == 0
    assert state_of(running, active["id"])[0] == "RUNNING"
    queues = running.prefect("POST", f"/work_pools/{runs.POOL}/queues/filter", {})
    limits = {queue["name"]: queue["concurrency_limit"] for queue in queues}
    assert limits == {"default": 1, "other": 1, "janitor": 1}


def test_a_run_survives_its_worker(folder: Path, running: Stack) -> None:
    run = long_run(running)
    processes_before = run_processes(running, run)
    lose("worker")
    stack.up()
    time.sleep(2)
    assert state_of(running, run)[0] == "RUNNING"
    assert run_processes(running, run) == processes_before


def test_a_run_that_died_with_its_worker_is_marked_as_crashed_and_frees_its_slot(
    folder: Path, running: Stack
) -> None:
    run = long_run(running)
    lose("worker")
    for process in run_processes(running, run):
        kill(process.pid)
    stack.up()
    assert state_of(running, run) == ("CRASHED", "its process was gone when the stack started")
    assert prefect(folder, "deployment", "run", "tiny/prod", "--watch").returncode == 0


def test_a_pending_run_of_a_killed_worker_is_started_by_the_next(folder: Path, running: Stack) -> None:
    lose("worker")
    run = submit(folder)
    running.prefect("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}, "force": True})
    stack.up()
    wait_until(lambda: state_of(running, run)[0] == "COMPLETED")


def test_the_janitor_marks_only_dead_runs_as_crashed(
    folder: Path, running: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, dead = start_long_run(folder, running), submit(folder)
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(running.state_dir))
    (process, *_) = run_processes(running, alive)
    held = {**leases.identify(process.pid), "host": platform.node()}
    write_json(leases.lease_file(alive), held)
    # Its pid has since been reused by another process.
    write_json(leases.lease_file(dead), {**held, "start_ticks": held["start_ticks"] - 1})
    running.prefect("POST", f"/flow_runs/{dead}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    assert prefect(folder, "deployment", "run", "janitor/local", "--watch").returncode == 0
    assert state_of(running, alive)[0] == "RUNNING"
    assert state_of(running, dead) == ("CRASHED", "the process ended without reporting its state")
    assert leases.leased_runs() == [alive]
    kill(process.pid)
    wait_until(lambda: state_of(running, alive)[0] == "CRASHED")


def test_services_that_end_come_back(folder: Path, running: Stack) -> None:
    keeper = pids()["keeper"]
    run = submit(folder, "--param", "seconds=20")
    wait_until(lambda: state_of(running, run)[0] == "RUNNING")
    before = pids()
    # The second time, the keeper is its parent.
    for service in (*services.SERVERS, *services.SERVERS):
        lost = pids()[service]
        kill(lost)
        wait_until(lambda lost=lost: lost not in pids().values() and are_healthy())  # type: ignore[misc]
    after = pids()
    assert after.pop("keeper") == keeper
    assert not set(after.values()) & set(before.values())
    wait_until(lambda: state_of(running, run)[0] == "COMPLETED")
    told = stack.find_log("keeper").read_text()
    assert re.findall(r"WARNING \| (\w+): ended", told) == [*services.SERVERS, *services.SERVERS]
    assert stack.problems() == {}


def are_healthy() -> bool:
    return all(is_healthy for *_, is_healthy in stack.status())


def test_down_cancels_the_run_and_leaves_no_process(folder: Path, running: Stack) -> None:
    active = start_long_run(folder, running)
    queued = submit(folder)
    assert stack.down() == ["keeper", "worker", "mlflow", "prefect"]
    assert processes(folder) == []
    assert not (folder / "prefect.toml").exists()
    assert not (folder / ".nightshift" / "stack.json").exists()
    with sqlite3.connect(folder / ".nightshift" / "prefect" / "prefect.db") as database:
        states = dict(database.execute("SELECT id, state_type FROM flow_run").fetchall())
        paused = database.execute("SELECT is_paused FROM work_pool").fetchall()
    database.close()
    assert states[active] == "CANCELLED"
    assert states[queued] == "SCHEDULED"
    assert paused == [(0,)]
    assert stack.down() == []
