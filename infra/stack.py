"""The local stack: a Prefect server, an MLflow server and one Prefect worker.

`up` reads `prefect.yaml` of the current directory, writes `prefect.toml` beside it, and keeps all
else in the state folder. The three are detached processes that outlive the command. Importing
Prefect or MLflow costs seconds: their own command lines and HTTP APIs are used instead.
"""

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from infra import processes
from infra.processes import HOST
from tasks.errors import ConfigError, StageError
from tasks.state import state_dir

POOL = "nightshift"
SERVICES = ("worker", "mlflow", "prefect")  # in the order of their end
PORTS = {"prefect": ("NIGHTSHIFT_PREFECT_PORT", 4200), "mlflow": ("NIGHTSHIFT_MLFLOW_PORT", 5000)}
HEARTBEAT_SECONDS = 30  # Prefect's minimum; the automation crashes a run that misses three
START_SECONDS, CANCEL_SECONDS, BUSY_SECONDS = 180, 45, 30
ACTIVE = ("PENDING", "RUNNING", "CANCELLING")
AUTOMATION = Path(__file__).with_name("automations") / "crash-zombie-flows.yaml"
PREFECT_TOML = Path("prefect.toml")
MARK = "# Written by `nightshift up`, removed by `nightshift down`; do not edit.\n"
# Variables of the user's shell that would lead a service to another database, profile or run.
FOREIGN = (
    *("PREFECT__", "PREFECT_API_", "PREFECT_PROFILE", "PREFECT_SERVER_", "MLFLOW_BACKEND_"),
    *("MLFLOW_DEFAULT_", "MLFLOW_REGISTRY_", "MLFLOW_RUN_ID", "MLFLOW_SERVER_"),
)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past the user's proxy
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

    def log_file(self, service: str) -> Path:
        """File with a service's output since its last start; `.log.1` holds the start before."""
        return self.state_dir / "logs" / f"{service}.log"


def environment(stack: Stack) -> dict[str, str]:
    """Return the variables, to lay over `os.environ`, that lead a process to the stack.

    The user's values of the quiet and offline switches win. The addresses, the heartbeat (the
    automation counts on it) and the ban on pickles are the stack's.
    """
    switches = {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # only MLflow's own judges need it
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # A run that waits for its deployment's slot asks again after 5 s rather than 30.
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
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
        "PREFECT_API_URL": stack.prefect_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_HOME": str(stack.state_dir / "prefect"),
        "no_proxy": bypass,
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
        worker = processes.find(records.get("worker"))
        if worker and _recorded(home) != stack:
            processes.end([worker])  # it speaks to an address that is no more
            worker = None
        _start("prefect", stack)
        _create_mlflow_database(stack)
        _start("mlflow", stack)
        _await("prefect", stack)
        PREFECT_TOML.write_text(prefect_toml(stack), encoding="utf-8")
        if not worker:
            _crash_runs(stack, "the worker was gone when the stack came up")
        _start("worker", stack)
        _await("worker", stack)
        _call(stack, "prefect", "--no-prompt", "deploy", "--all")
        _limit_queues(stack)
        _create_automation(stack)
        _await("mlflow", stack)
        if _prefect(stack, "GET", f"/work_pools/{POOL}")["is_paused"]:
            log.warning("no run starts; to change it: prefect work-pool resume %s", POOL)
    if os.environ.get("PREFECT_API_URL", stack.prefect_url) != stack.prefect_url:
        log.warning("PREFECT_API_URL leads prefect elsewhere; unset it to reach the stack")
    return stack


def down() -> list[str]:
    """End the active runs, the worker and the servers; return the names of what was ended."""
    if not state_dir().is_dir():
        log.info("nothing was running")
        return []
    with processes.locked(state_dir()) as home:
        records = processes.read_records(home)
        live = {name: found for name in SERVICES if (found := processes.find(records.get(name)))}
        try:
            if "prefect" in live:
                _end_runs(_recorded(home), live.get("worker"))
        except StageError as err:
            log.warning("active runs are left to the next `nightshift up`: %s", err)
        processes.end([live[name] for name in live if name == "worker"])
        processes.end(_run_processes(home))
        processes.end([live[name] for name in live if name != "worker"])
        processes.write_records(home, {})
        if PREFECT_TOML.exists() and _is_own(PREFECT_TOML):
            PREFECT_TOML.unlink()
    log.info("ended: %s", ", ".join(live) or "nothing was running")
    return list(live)


def status() -> list[tuple[str, int | None, str, bool]]:
    """List (service, pid, url, is healthy) of each service; of an ended one no pid and no url."""
    stack, records = _recorded(state_dir()), processes.read_records(state_dir())
    rows: list[tuple[str, int | None, str, bool]] = []
    for service in reversed(SERVICES):
        if found := processes.find(records.get(service)):
            rows.append((service, found.pid, _url(service, stack), _is_healthy(service, stack)))
        else:
            rows.append((service, None, "", False))
    return rows


def find_stack() -> Stack | None:
    """Return the stack when both its servers run."""
    records = processes.read_records(state_dir())
    return _recorded(state_dir()) if all(processes.find(records.get(name)) for name in PORTS) else None


def prefect_toml(stack: Stack) -> str:
    """Render the settings that lead a plain `prefect` command of this folder to the stack.

    The heartbeat is there for flows run by hand: the automation would crash a slower one.
    """
    home = stack.state_dir / "prefect"
    return f"""{MARK}home = {json.dumps(str(home), ensure_ascii=False)}
profiles_path = {json.dumps(str(home / "profiles.toml"), ensure_ascii=False)}
[api]
url = "{stack.prefect_url}"
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
    if record and processes.find(record):
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
    """Return the command that runs a service in the foreground."""
    listen = ["--host", HOST, "--port", str(_port(service, stack))]
    return {
        "prefect": ["prefect", "server", "start", *listen],
        "mlflow": [
            *("mlflow", "server", *listen, "--workers", "1", "--uvicorn-opts", "--no-access-log"),
            *("--backend-store-uri", f"sqlite:///{stack.state_dir / 'mlflow.db'}"),
            *("--artifacts-destination", str(stack.state_dir / "mlflow-artifacts")),
            *("--allowed-hosts", f"localhost,localhost:*,{HOST},{HOST}:*"),
        ],
        "worker": [
            *("prefect", "worker", "start", "--name", POOL),
            *("--pool", POOL, "--type", "process"),  # it creates the pool when there is none
        ],
    }[service]


def _python(*arguments: str) -> list[str]:
    """Name a module to this interpreter; -P keeps the current folder off its import path."""
    return [sys.executable, "-P", "-m", *arguments]


def _child_environment(stack: Stack) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    return kept | environment(stack)


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
    if processes.find(records.get(service)):
        return
    output = stack.log_file(service)
    output.parent.mkdir(exist_ok=True)
    if output.exists():
        output.replace(output.with_suffix(".log.1"))
    pid = os.posix_spawn(
        sys.executable,
        _python(*_command(service, stack)),
        _child_environment(stack),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        # `make run &` ignores SIGINT; a worker that inherits this does not end by SIGTERM either.
        setsigdef=[signal.SIGINT],
    )
    created = psutil.Process(pid).create_time()
    records[service] = {"pid": pid, "create_time": created, "port": _port(service, stack)}
    processes.write_records(stack.state_dir, records)


def _await(service: str, stack: Stack) -> None:
    """Wait until a service is healthy."""
    record, output = processes.read_records(stack.state_dir)[service], stack.log_file(service)
    deadline = time.monotonic() + START_SECONDS
    while True:
        if not processes.find(record):
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
            request("GET", f"{stack.mlflow_url}/health")
            return True
        if service == "prefect":
            _prefect(stack, "GET", "/health")
            return True
        # For 90 s the pool shows a killed worker as online; the log is of the present one.
        with stack.log_file(service).open(errors="replace") as output:
            if "started!" in output.read(65536):
                workers = _prefect(stack, "POST", f"/work_pools/{POOL}/workers/filter", {})
                return any(worker["status"] == "ONLINE" for worker in workers)
    return False


def request(method: str, url: str, body: object = None) -> Any:
    """Send a request and return the JSON of the answer, if it is JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with DIRECT.open(request, timeout=30) as answer:
                text = answer.read()
                return json.loads(text) if "json" in answer.headers.get_content_type() else None
        except (OSError, http.client.HTTPException) as err:
            # Prefect answers 503 to what a client should ask again: its database was locked.
            is_busy = (
                isinstance(err, urllib.error.HTTPError) and err.code == http.HTTPStatus.SERVICE_UNAVAILABLE
            )
            if not is_busy or time.monotonic() > deadline:
                raise StageError(f"{method} {url}: {err}; the logs in {state_dir()} may say why") from err
            log.info("%s is busy; asking again", url)
            time.sleep(1)


def _prefect(stack: Stack, method: str, path: str, body: object = None) -> Any:
    return request(method, f"{stack.prefect_url}{path}", body)


def _limit_queues(stack: Stack) -> None:
    """Let each queue run one at a time, whichever deployment the run comes from."""
    queues = f"/work_pools/{POOL}/queues"
    for queue in _prefect(stack, "POST", f"{queues}/filter", {}):
        _prefect(stack, "PATCH", f"{queues}/{queue['name']}", {"concurrency_limit": 1})


def _create_automation(stack: Stack) -> None:
    """Create the automation once: the user may switch it off, and an update would disarm it."""
    automation = yaml.safe_load(AUTOMATION.read_text(encoding="utf-8"))
    same_name = {"automations": {"name": {"any_": [automation["name"]]}}}
    if not _prefect(stack, "POST", "/automations/filter", same_name):
        _prefect(stack, "POST", "/automations/", automation)


def _active_runs(stack: Stack) -> list[dict[str, Any]]:
    """List the pool's flow runs that hold a process and a concurrency slot."""
    active = {"state": {"type": {"any_": ACTIVE}}}
    body = {"work_pools": {"name": {"any_": [POOL]}}, "flow_runs": active}
    return list(_prefect(stack, "POST", "/flow_runs/filter", body))


def _set_state(stack: Stack, run: dict[str, Any], name: str, message: str) -> None:
    # Forced, a state ends the run and frees its slot whatever Prefect's rules say.
    state = {"type": name.upper(), "name": name, "message": message}
    body = {"state": state, "force": name == "Crashed"}
    _prefect(stack, "POST", f"/flow_runs/{run['id']}/set_state", body)
    log.info("flow run %s: %s, %s", run["name"], name.lower(), message)


def _crash_runs(stack: Stack, message: str) -> None:
    """Crash the active runs, and end their processes, which may outlive the worker."""
    runs = _active_runs(stack)
    processes.end(_run_processes(stack.state_dir))
    for run in runs:
        # A process that is ended reports a crash by itself, but not the reason for it.
        now = _prefect(stack, "GET", f"/flow_runs/{run['id']}")["state"]["type"]
        if now in (*ACTIVE, "CRASHED"):
            _set_state(stack, run, "Crashed", message)


def _end_runs(stack: Stack, worker: psutil.Process | None) -> None:
    """Let the worker cancel its runs, and end it; paused, it starts no queued run meanwhile."""
    pool = f"/work_pools/{POOL}"
    if worker:
        was_paused = _prefect(stack, "GET", pool)["is_paused"]
        _prefect(stack, "PATCH", pool, {"is_paused": True})
        try:
            for run in _active_runs(stack):
                _set_state(stack, run, "Cancelling", "the stack goes down")
            deadline = time.monotonic() + CANCEL_SECONDS
            while _active_runs(stack) and time.monotonic() < deadline:
                time.sleep(0.5)
            processes.end([worker])
        finally:
            _prefect(stack, "PATCH", pool, {"is_paused": was_paused})
    _crash_runs(stack, "the stack went down")


def _run_processes(home: Path) -> list[psutil.Process]:
    """Find the processes of this stack's flow runs by what they inherit, orphans included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            inherited = process.environ()
            is_run = "PREFECT__FLOW_RUN_ID" in inherited
            if is_run and inherited.get("NIGHTSHIFT_HOME") == str(home):
                found.append(process)
    return found
