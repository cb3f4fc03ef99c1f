"""The stack's ports, environment and settings, and the processes that it never ends."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from infra.local import prefect_api, processes, runs, services, stack
from infra.local.settings import Stack, environment, prefect_toml, service_environment
from nightshift.core.errors import ConfigError, StageError
from nightshift.pipeline import leases
from nightshift.registry.record import Action, Entry, line, tag

STACK = Stack(Path("/srv/night shift"), 4300, 5100)


@pytest.fixture
def folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with something to deploy, with the stack's variables unset."""
    for variable, _ in stack.PORTS.values():
        monkeypatch.delenv(variable, raising=False)
    (in_tmp / "prefect.yaml").write_text("deployments: []\n")
    return in_tmp


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """Yield a process that does not belong to the stack."""
    process = subprocess.Popen(["sleep", "60"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def record(folder: Path, service: str, process: psutil.Process, age: int = 0) -> None:
    entry = {**leases.identify(process.pid), "port": 4300}
    entry["start_ticks"] -= age
    (folder / ".nightshift").mkdir()
    (folder / ".nightshift" / "stack.json").write_text(json.dumps({service: entry}))


def test_a_requested_port_in_use_is_an_error_with_its_process(
    folder: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_MLFLOW_PORT", str(taken_port))
    with pytest.raises(ConfigError) as caught:
        stack.up()
    holder = f"pid {os.getpid()} ({psutil.Process().name()})"
    assert str(caught.value) == (
        f"NIGHTSHIFT_MLFLOW_PORT: port {taken_port} is in use: {holder}; "
        "end that process or choose another port"
    )
    assert not (folder / "prefect.toml").exists()


@pytest.mark.parametrize("named", ["0", "65536", "-1", "4200.0", "http"])
@pytest.mark.usefixtures("folder")
def test_a_requested_port_must_be_valid(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_PREFECT_PORT", named)
    with pytest.raises(ConfigError, match="NIGHTSHIFT_PREFECT_PORT: must be a port from 1 to 65535"):
        stack.up()


@pytest.mark.usefixtures("folder")
def test_a_default_port_in_use_is_replaced_and_reported(
    taken_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(stack.PORTS, "prefect", ("NIGHTSHIFT_PREFECT_PORT", taken_port))
    with caplog.at_level("INFO"):
        port = stack._choose_port("prefect", None)
    assert port != taken_port
    assert f"prefect: port {taken_port} is in use: pid {os.getpid()}" in caplog.text
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))


@pytest.mark.usefixtures("folder")
def test_a_stopped_service_keeps_its_last_port(taken_port: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        before = free.getsockname()[1]
    ended = {**leases.identify(os.getpid()), "start_ticks": 1, "port": before}
    assert stack._choose_port("prefect", ended) == before
    assert stack._choose_port("prefect", ended | {"port": taken_port}) != taken_port


@pytest.mark.usefixtures("folder")
def test_a_running_service_keeps_its_port(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_PREFECT_PORT", "4301")
    running = {**leases.identify(os.getpid()), "port": 4300}
    assert stack._choose_port("prefect", running) == 4300
    assert "prefect stays on port 4300" in caplog.text


def test_a_reused_pid_is_neither_shown_nor_ended(folder: Path, bystander: psutil.Process) -> None:
    record(folder, "worker", bystander, age=100)
    assert stack.status() == [
        ("prefect", None, "", False),
        ("mlflow", None, "", False),
        ("worker", None, "", False),
        ("keeper", None, "", False),
    ]
    assert stack.down() == []
    assert bystander.is_running()


def test_a_recorded_process_is_ended_with_its_children(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.1)
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    while not (children := psutil.Process(parent.pid).children()):
        time.sleep(0.01)
    record(folder, "worker", psutil.Process(parent.pid))
    assert stack.down() == ["worker"]
    assert [process for process in children if leases.is_alive(process)] == []
    assert parent.wait(timeout=5) == -signal.SIGTERM
    assert stack.down() == []


def test_what_a_killed_server_leaves_in_its_session_is_ended(folder: Path) -> None:
    server = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    while not (children := psutil.Process(server.pid).children()):
        time.sleep(0.01)
    found = {**leases.identify(server.pid), "port": 1}
    processes.end_remains(found)
    assert server.poll() is None
    server.kill()
    server.wait()
    processes.end_remains(found | {"boot_id": "another"})
    assert leases.is_alive(children[0])
    processes.end_remains(found)
    assert not leases.is_alive(children[0])


def test_a_process_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.1)
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.1)
    deaf = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"], stdout=subprocess.PIPE
    )
    assert deaf.stdout is not None
    with deaf.stdout:
        deaf.stdout.readline()
        processes.end([psutil.Process(deaf.pid)])
    assert deaf.wait(timeout=5) == -signal.SIGKILL


def test_a_service_that_exits_during_startup_shows_its_last_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Stack(folder / ".nightshift", 1, 1)
    here.state_dir.mkdir()
    monkeypatch.setattr(services, "_command", lambda *_: ["no_such_module"])
    services.start("prefect", here)
    with pytest.raises(StageError, match=r"prefect: exited during startup(.|\n)*no_such_module"):
        services.wait_until_healthy("prefect", here)


def test_a_service_that_cannot_be_recorded_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(home: Path, records: dict[str, processes.Record]) -> None:
        started.update(records)
        raise OSError(errno.ENOSPC, "No space left on device", str(home))

    started: dict[str, processes.Record] = {}
    here = Stack(folder / ".nightshift", 1, 1)
    here.state_dir.mkdir()
    monkeypatch.setattr(services, "_command", lambda *_: ["http.server", "--bind", "127.0.0.1", "0"])
    monkeypatch.setattr(processes, "write_records", fail)
    with pytest.raises(OSError, match="No space left"):
        services.start("prefect", here)
    assert leases.find_process(started["prefect"]) is None


def test_up_on_a_full_disk_starts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "MIN_FREE_MIB", 2**40)
    with pytest.raises(
        StageError, match=rf"{folder}/\.nightshift: the disk has \d+ MiB left, the servers need"
    ):
        stack.up()
    assert [path.name for path in (folder / ".nightshift").iterdir()] == ["stack.lock"]


def test_down_ends_everything_on_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    record(folder, "worker", psutil.Process(process.pid))
    (folder / ".nightshift" / "stack.lock").touch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Like a full disk: every write of a byte fails, with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        ended = stack.down()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ended == ["worker"]
    assert process.wait(timeout=5) == -signal.SIGTERM
    assert processes.read_records(folder / ".nightshift") == {}


def test_the_environment_connects_to_the_stack_without_telemetry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment(STACK).keys() - {"PATH"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert environment(STACK) == {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_REGISTRY_URI": "http://127.0.0.1:5100",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5100",
        "NIGHTSHIFT_HOME": "/srv/night shift",
        "NO_PROXY": "127.0.0.1,localhost",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin",
        "PREFECT_API_AUTH_STRING": "",
        "PREFECT_API_URL": "http://127.0.0.1:4300/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_HOME": "/srv/night shift/prefect",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,nightshift,tasks",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.mark.parametrize(
    ("name", "users", "effective"),
    [
        ("DO_NOT_TRACK", "0", "0"),
        ("PREFECT_WORKER_QUERY_SECONDS", "7", "7"),
        ("no_proxy", "intranet", "intranet,127.0.0.1,localhost"),
        ("PREFECT_API_URL", "https://elsewhere/api", "http://127.0.0.1:4300/api"),
        ("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "180", "30"),
        ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true", "false"),
    ],
)
def test_user_settings_take_precedence_except_for_addresses_and_security(
    name: str, users: str, effective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, users)
    assert environment(STACK)[name] == effective


def test_a_service_does_not_inherit_foreign_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PREFECT_API_KEY",
        "PREFECT_PROFILE",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "PREFECT__FLOW_RUN_ID",
        "MLFLOW_BACKEND_STORE_URI",
        "MLFLOW_RUN_ID",
    ):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("AWS_PROFILE", "kept")
    inherited = service_environment(STACK)
    assert [name for name, value in inherited.items() if value == "elsewhere"] == []
    assert inherited["AWS_PROFILE"] == "kept"


def test_prefect_toml_connects_a_plain_prefect_to_the_stack() -> None:
    assert tomllib.loads(prefect_toml(STACK)) == {
        "home": "/srv/night shift/prefect",
        "profiles_path": "/srv/night shift/prefect/profiles.toml",
        "api": {"url": "http://127.0.0.1:4300/api", "auth_string": ""},
        "flows": {"heartbeat_frequency": 30},
        "logging": {"extra_loggers": "flows,nightshift,tasks", "to_api": {"when_missing_flow": "ignore"}},
        "server": {"analytics_enabled": False},
    }


def test_a_prefect_toml_of_the_user_is_unchanged(folder: Path) -> None:
    own = folder / "prefect.toml"
    own.write_text('[api]\nurl = "https://elsewhere/api"\n')
    with pytest.raises(ConfigError, match=r"prefect\.toml: not written by the stack"):
        stack.up()
    assert stack.down() == []
    assert own.read_text() == '[api]\nurl = "https://elsewhere/api"\n'


def test_a_version_that_awaits_approval_is_found_by_its_alias(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "params.yaml").write_text("registry: {model_name: support chat}\n")
    asked: list[str] = []

    def request(method: str, url: str) -> object:
        asked.append(f"{method} {url.partition('/api/')[2]}")
        if len(asked) > 1:
            raise StageError("HTTP Error 404")
        return {"model_version": {"version": "3"}}

    monkeypatch.setattr(stack.services, "is_healthy", lambda *_: True)
    monkeypatch.setattr(stack.prefect_api, "request", request)
    assert [stack.find_waiting(), stack.find_waiting()] == [3, None]
    assert asked[0] == "GET 2.0/mlflow/registered-models/alias?name=support+chat&alias=challenger"
    monkeypatch.setattr(stack.services, "is_healthy", lambda *_: False)
    assert stack.find_waiting() is None
    assert len(asked) == 2


def test_the_champion_is_that_of_the_last_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "params.yaml").write_text("registry: {model_name: support chat}\n")
    moves: list[tuple[Action, int]] = [("promote", 1), ("promote", 2), ("rollback", 1), ("acknowledge", 1)]
    tags = {"nightshift.promotions": "digest"} | {
        tag(number): line(
            Entry(f"2026-01-0{number}T02:30:00+00:00", action, champion, None, None, "", "", "")
        )
        for number, (action, champion) in enumerate(moves, start=1)
    }
    found = {"registered_model": {"tags": [{"key": key, "value": value} for key, value in tags.items()]}}
    monkeypatch.setattr(stack.services, "is_healthy", lambda *_: True)
    monkeypatch.setattr(stack.prefect_api, "request", lambda *_: found)
    local = datetime(2026, 1, 3, 2, 30, tzinfo=UTC).astimezone()
    assert stack.find_champion() == f"version 1 since {local:%a %Y-%m-%d %H:%M} (rollback)"
    found["registered_model"] = {"tags": []}
    assert stack.find_champion() is None


@pytest.mark.usefixtures("in_tmp")
def test_up_requires_prefect_yaml() -> None:
    with pytest.raises(ConfigError, match=r"no prefect\.yaml; run from the folder that contains it"):
        stack.up()


def test_down_leaves_no_trace_in_a_folder_without_a_stack(in_tmp: Path) -> None:
    assert stack.down() == []
    assert list(in_tmp.iterdir()) == []


def test_a_record_of_an_earlier_version_is_an_error(folder: Path) -> None:
    (folder / ".nightshift").mkdir()
    entry = {"prefect": {"pid": os.getpid(), "create_time": 1.0, "port": 4300}}
    (folder / ".nightshift" / "stack.json").write_text(json.dumps(entry))
    with pytest.raises(StageError, match=rf"written by an earlier version: prefect may be pid {os.getpid()}"):
        stack.up()


def test_a_worker_whose_server_moved_is_ended_only_if_no_run_needs_the_old_address(
    folder: Path, bystander: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(folder, "prefect", bystander)
    moved = Stack(folder / ".nightshift", 4301, 0)
    monkeypatch.setattr(runs, "run_processes", lambda _: [("a run", bystander)])
    for worker in (bystander, None):
        with pytest.raises(ConfigError, match=r"a run is active and reports to http://127\.0\.0\.1:4300"):
            stack._end_lost_worker(moved, worker)
    assert leases.is_alive(bystander)
    monkeypatch.setattr(runs, "run_processes", lambda _: [])
    assert stack._end_lost_worker(moved, bystander) is None
    assert not leases.is_alive(bystander)


def test_ignored_variables_are_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql://elsewhere")
    stack._warn_of_ignored_variables(STACK)
    assert "the stack ignores PREFECT_SERVER_DATABASE_CONNECTION_URL, but" in caplog.text
    assert "elsewhere" not in caplog.text


def test_the_secret_is_created_once_and_readable_only_by_its_owner(folder: Path) -> None:
    here = Stack(folder / ".nightshift", 1, 1)
    here.state_dir.mkdir()
    stack._create_auth(here)
    made = here.auth_string
    stack._create_auth(here)
    assert here.auth_string == made
    assert len(made) == len("nightshift:") + 32
    assert here.auth_file.stat().st_mode & 0o777 == 0o600


def test_the_command_line_loads_no_heavy_libraries() -> None:
    code = "import sys, infra.local.stack; print({'prefect', 'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_busy_server_is_retried_with_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [503, 503, 200]

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"ok": true}')

        def log_message(self, *_: object) -> None:
            """Suppress request logging."""

    monkeypatch.setattr(prefect_api.time, "sleep", lambda _: None)
    with HTTPServer(("127.0.0.1", 0), Busy) as server, caplog.at_level("INFO"):
        Thread(target=server.serve_forever, daemon=True).start()
        assert prefect_api.request("GET", f"http://127.0.0.1:{server.server_port}/x") == {"ok": True}
        server.shutdown()
    assert caplog.text.count("is busy; retrying") == 2
