"""The local stack: a Prefect server, an MLflow server and one Prefect worker.

`up` reads `prefect.yaml` of the current directory, writes `prefect.toml` beside it, and keeps all
else in the state folder. The three are detached processes that outlive the command. Importing
Prefect or MLflow costs seconds: their own command lines and HTTP APIs are used instead.
"""

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra import prefect_api, processes, runs
from infra.processes import HOST
from infra.runs import POOL
from infra.service_logs import unexplained
from tasks.errors import ConfigError, StageError
from tasks.leases import find_process, identify
from tasks.state import state_dir

SERVICES = ("worker", "mlflow", "prefect")  # in the order of their end
PORTS = {"prefect": ("NIGHTSHIFT_PREFECT_PORT", 4200), "mlflow": ("NIGHTSHIFT_MLFLOW_PORT", 5000)}
HEARTBEAT_SECONDS = 30  # Prefect's minimum; the automation looks after a run that misses three
START_SECONDS = 180
PREFECT_TOML = Path("prefect.toml")
MARK = "# Written by `nightshift up`, removed by `nightshift down`; do not edit.\n"
# Variables of the user's shell that would lead a service to another database, profile or run.
FOREIGN = (
    *("PREFECT__", "PREFECT_API_", "PREFECT_PROFILE", "PREFECT_SERVER_", "MLFLOW_BACKEND_"),
    *("MLFLOW_DEFAULT_", "MLFLOW_REGISTRY_", "MLFLOW_RUN_ID", "MLFLOW_SERVER_"),
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the local stack lives and listens."""

    state_dir: Path
    prefect_port: int
    mlflow_port: int

    @property
    def prefect_ui(self) -> str:
        """Address of Prefect's pages."""
        return f"http://{HOST}:{self.prefect_port}"

    @property
    def prefect_url(self) -> str:
        """Address of Prefect's API."""
        return f"{self.prefect_ui}/api"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow: pages, API and artifacts."""
        return f"http://{HOST}:{self.mlflow_port}"

    @property
    def auth_file(self) -> Path:
        """File with the `user:password` that Prefect's API asks for."""
        return self.state_dir / "prefect-auth"

    @property
    def auth_string(self) -> str:
        """What `auth_file` holds; empty before the first `up`."""
        return self.auth_file.read_text() if self.auth_file.is_file() else ""

    def prefect(self, method: str, path: str, body: object = None) -> Any:
        """Call Prefect's API; see `infra.prefect_api.call`."""
        return prefect_api.call(self.prefect_url, self.auth_string, method, path, body)

    def log_file(self, service: str) -> Path:
        """File with a service's output since its last start; `.log.1` holds the start before."""
        return self.state_dir / "logs" / f"{service}.log"


def environment(stack: Stack) -> dict[str, str]:
    """Return the variables, to lay over `os.environ`, that lead a process to the stack.

    The user's values of the quiet switches win. The addresses, the heartbeat (the
    automation counts on it) and the ban on pickles are the stack's.
    """
    switches = {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # only MLflow's own judges need it
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    users = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    bypass = ",".join(filter(None, [users, HOST, "localhost"]))
    return {name: os.environ.get(name, value) for name, value in switches.items()} | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_REGISTRY_URI": stack.mlflow_url,
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        "NIGHTSHIFT_CHECKOUT": str(Path.cwd()),  # a prefect.yaml may name it
        "NIGHTSHIFT_HOME": str(stack.state_dir),
        "NO_PROXY": bypass,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PREFECT_API_AUTH_STRING": stack.auth_string,
        "PREFECT_API_URL": stack.prefect_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_HOME": str(stack.state_dir / "prefect"),
        "no_proxy": bypass,
    }


def server_environment(stack: Stack) -> dict[str, str]:
    """Return what closes the Prefect server, beside `environment`."""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": stack.auth_string,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": stack.prefect_ui,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(stack.prefect_port),
        # In memory, the default, a restart would lose the leases of whatever limit a user sets.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def up() -> Stack:
    """Start what does not run, deploy `prefect.yaml`, and return the stack.

    Raises:
        ConfigError: No `prefect.yaml`, a `prefect.toml` of the user's own, or a taken named port.
        StageError: A service or the deployment failed; the message ends with its last lines.
    """
    if not Path("prefect.yaml").is_file():
        raise ConfigError(f"{Path.cwd()}: no prefect.yaml; run from the folder that holds it")
    with processes.locked(state_dir()) as home:
        if PREFECT_TOML.exists() and not _is_own(PREFECT_TOML):
            raise ConfigError(f"{PREFECT_TOML}: not written by the stack; move it out of the way")
        records = processes.read_records(home)
        stack = Stack(home, *(_choose_port(name, records.get(name)) for name in PORTS))
        worker = _end_lost_worker(stack, find_process(records.get("worker")))
        _create_auth(stack)
        _start("prefect", stack)
        _create_mlflow_database(stack)
        _start("mlflow", stack)
        _await("prefect", stack)
        _write_private(PREFECT_TOML, prefect_toml(stack))
        runs.create_pool(stack)
        if not worker:
            runs.settle(stack)
        _start("worker", stack)
        _await("worker", stack)
        _call(stack, "prefect", "--no-prompt", "deploy", "--all")
        runs.limit_queues(stack)
        runs.create_automation(stack)
        _await("mlflow", stack)
        if stack.prefect("GET", f"/work_pools/{POOL}")["is_paused"]:
            log.warning("no run starts; to change it: prefect work-pool resume %s", POOL)
    _warn_of_ignored_variables(stack)
    return stack


def down() -> list[str]:
    """End the active runs, the worker and the servers; return the names of what was ended."""
    if not state_dir().is_dir():
        log.info("nothing was running")
        return []
    with processes.locked(state_dir()) as home:
        records = processes.read_records(home)
        live = {name: found for name in SERVICES if (found := find_process(records.get(name)))}
        try:
            if "prefect" in live:
                runs.cancel(_recorded(home), live.get("worker"))
        except StageError as err:
            log.warning("active runs are left to the next `nightshift up`: %s", err)
        processes.end([live[name] for name in live if name == "worker"])
        runs.end_run_processes(home)
        processes.end([live[name] for name in live if name != "worker"])
        processes.write_records(home, {})
        if PREFECT_TOML.exists() and _is_own(PREFECT_TOML):
            PREFECT_TOML.unlink()
    log.info("ended: %s", ", ".join(live) or "nothing was running")
    return list(live)


def problems() -> dict[str, list[str]]:
    """Return service -> the errors in its log that docs/operations.md does not explain."""
    return {name: found for name in SERVICES if (found := unexplained(find_log(name)))}


def find_log(service: str) -> Path:
    """Return the file with a service's output since its last start."""
    return _recorded(state_dir()).log_file(service)


def status() -> list[tuple[str, int | None, str, bool]]:
    """List (service, pid, url, is healthy) of each service; of an ended one no pid and no url."""
    stack, records = _recorded(state_dir()), processes.read_records(state_dir())
    rows: list[tuple[str, int | None, str, bool]] = []
    for service in reversed(SERVICES):
        if found := find_process(records.get(service)):
            rows.append((service, found.pid, _url(service, stack), _is_healthy(service, stack)))
        else:
            rows.append((service, None, "", False))
    return rows


def find_stack() -> Stack | None:
    """Return the stack when both its servers run."""
    records = processes.read_records(state_dir())
    return _recorded(state_dir()) if all(find_process(records.get(name)) for name in PORTS) else None


def prefect_toml(stack: Stack) -> str:
    """Render the settings that lead a plain `prefect` command of this folder to the stack.

    The heartbeat is there for flows run by hand: the automation would crash a slower one.
    """
    home = stack.state_dir / "prefect"
    return f"""{MARK}home = {json.dumps(str(home), ensure_ascii=False)}
profiles_path = {json.dumps(str(home / "profiles.toml"), ensure_ascii=False)}
[api]
url = "{stack.prefect_url}"
auth_string = {json.dumps(stack.auth_string)}
[flows]
heartbeat_frequency = {HEARTBEAT_SECONDS}
[logging]
extra_loggers = "flows,tasks"
to_api = {{ when_missing_flow = "ignore" }}
[server]
analytics_enabled = false
"""


def _is_own(path: Path) -> bool:
    return path.read_text(encoding="utf-8").startswith(MARK)


def _recorded(home: Path) -> Stack:
    return Stack(home, *(int(processes.read_records(home).get(name, {}).get("port", 0)) for name in PORTS))


def _choose_port(service: str, record: processes.Record | None) -> int:
    """Return the port where the service runs, else where it ran, else the named or default one."""
    variable, default = PORTS[service]
    named = os.environ.get(variable, "")
    if named and not (named.isdecimal() and 0 < int(named) < 65536):
        raise ConfigError(f"{variable}: must be a port from 1 to 65535, got {named!r}")
    if record and find_process(record):
        if named and int(named) != record["port"]:
            log.warning("%s stays on port %d; to move it, take the stack down", service, record["port"])
        return int(record["port"])
    wanted = int(named or (record or {}).get("port") or default)
    if not (holder := processes.port_holder(wanted)):
        return wanted
    if named:
        raise ConfigError(f"{variable}: port {wanted} is taken: {holder}; end that or name another")
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = int(free.getsockname()[1])
    log.info("%s: port %d is taken: %s; using %d", service, wanted, holder, port)
    return port


def _port(service: str, stack: Stack) -> int:
    return {"prefect": stack.prefect_port, "mlflow": stack.mlflow_port, "worker": 0}[service]


def _url(service: str, stack: Stack) -> str:
    return stack.mlflow_url if service == "mlflow" else stack.prefect_ui


def _command(service: str, stack: Stack) -> list[str]:
    """Return the module that runs a service in the foreground, and its arguments."""
    port = ["--port", str(_port(service, stack))]
    return {
        "prefect": ["infra.prefect_server", *port],
        "mlflow": [
            *("mlflow", "server", "--host", HOST, *port),
            *("--workers", "1", "--uvicorn-opts", "--no-access-log"),
            *("--backend-store-uri", f"sqlite:///{stack.state_dir / 'mlflow.db'}"),
            *("--artifacts-destination", str(stack.state_dir / "mlflow-artifacts")),
            *("--allowed-hosts", f"localhost,localhost:*,{HOST},{HOST}:*"),
        ],
        "worker": ["infra.outlast", "prefect", "worker", "start", "--name", POOL, "--pool", POOL],
    }[service]


def _python(*arguments: str) -> list[str]:
    """Name a module to this interpreter; -P keeps the current folder off its import path."""
    return [sys.executable, "-P", "-m", *arguments]


def _child_environment(stack: Stack) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    return kept | environment(stack)


def _warn_of_ignored_variables(stack: Stack) -> None:
    """Name the variables of the user's shell that the stack does not take over."""
    ours = environment(stack)
    ignored = [
        name
        for name, value in sorted(os.environ.items())
        if name.startswith(FOREIGN) and not name.startswith("PREFECT__") and ours.get(name) != value
    ]
    if ignored:
        log.warning(
            "the stack has settings of its own; ignored: %s; prefect and mlflow typed here follow them",
            ", ".join(ignored),
        )


def _create_auth(stack: Stack) -> None:
    """Make the `user:password` of Prefect's API once."""
    if not stack.auth_file.is_file():
        _write_private(stack.auth_file, f"nightshift:{secrets.token_urlsafe(24)}")


def _write_private(path: Path, text: str) -> None:
    """Write a file that holds a secret: no other user may read it, not even while it is written."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600, exist_ok=False)
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _end_lost_worker(stack: Stack, worker: psutil.Process | None) -> psutil.Process | None:
    """End a worker that speaks to an address which is no more; return it if it may stay.

    Raises:
        ConfigError: A run that lives speaks to that address too.
    """
    before = _recorded(stack.state_dir)
    if before == stack:
        return worker
    if runs.run_processes(stack.state_dir):
        raise ConfigError(
            f"a run is under way and reports to {before.prefect_ui} and {before.mlflow_url}, but a port is "
            "taken by another program; free it, or end the run with `nightshift down`"
        )
    processes.end([worker] if worker else [])
    return None


def _call(stack: Stack, *arguments: str) -> None:
    """Run a command to its end."""
    done = subprocess.run(
        _python(*arguments),
        env=_child_environment(stack) | {"COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        failure = f"{' '.join(arguments)}: exit code {done.returncode}"
        raise StageError(f"{failure}; correct what its last lines say:\n{_tail(done.stdout)}")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])


def _create_mlflow_database(stack: Stack) -> None:
    """Create the tables under another name: a half-made database is never taken for a whole."""
    database = stack.state_dir / "mlflow.db"
    if not database.exists():
        fresh = database.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        _call(stack, "mlflow", "db", "upgrade", f"sqlite:///{fresh}")
        if not database.exists():  # a stage run by hand may have been faster
            fresh.replace(database)


def _start(service: str, stack: Stack) -> None:
    """Start a service as a detached process and record it, unless it runs."""
    records = processes.read_records(stack.state_dir)
    if find_process(records.get(service)):
        return
    output = stack.log_file(service)
    output.parent.mkdir(exist_ok=True)
    if output.exists():
        output.replace(output.with_suffix(".log.1"))
    server = server_environment(stack) if service == "prefect" else {}
    pid = os.posix_spawn(
        sys.executable,
        _python(*_command(service, stack)),
        _child_environment(stack) | server,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        # `make run &` ignores SIGINT; a worker that inherits this does not end by SIGTERM either.
        setsigdef=[signal.SIGINT],
    )
    records[service] = {**identify(pid), "port": _port(service, stack)}
    processes.write_records(stack.state_dir, records)


def _await(service: str, stack: Stack) -> None:
    """Wait until a service is healthy."""
    record, output = processes.read_records(stack.state_dir)[service], stack.log_file(service)
    deadline = time.monotonic() + START_SECONDS
    while True:
        if not find_process(record):
            text = _tail(output.read_text(errors="replace"))
            raise StageError(f"{service}: ended at its start; the end of {output} says why:\n{text}")
        if _is_healthy(service, stack):
            return log.info("%s: %s, pid %d", service, _url(service, stack), record["pid"])
        if time.monotonic() > deadline:
            raise StageError(f"{service}: not healthy after {START_SECONDS} s; read {output}")
        time.sleep(0.2)


def _is_healthy(service: str, stack: Stack) -> bool:
    with contextlib.suppress(StageError, OSError):
        if service == "mlflow":
            prefect_api.request("GET", f"{stack.mlflow_url}/health")
            return True
        if service == "prefect":
            stack.prefect("GET", "/ready")
            return True
        # For 90 s the pool shows a killed worker as online; the log is of the present one.
        with stack.log_file(service).open(errors="replace") as output:
            if "started!" in output.read(65536):
                workers = stack.prefect("POST", f"/work_pools/{POOL}/workers/filter", {})
                return any(worker["status"] == "ONLINE" for worker in workers)
    return False
