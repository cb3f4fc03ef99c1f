"""Start the services as detached processes, and check their health."""

import contextlib
import datetime
import logging
import os
import signal
import subprocess
import sys
import time

from infra.local import prefect_api, processes
from infra.local.processes import HOST
from infra.local.runs import POOL
from infra.local.settings import Stack, server_environment, service_environment
from nightshift.core.errors import StageError
from nightshift.core.state import ARTIFACTS, DATABASE
from nightshift.pipeline.leases import find_process, identify

# In shutdown order.
SERVERS = ("worker", "mlflow", "prefect")
SERVICES = ("keeper", *SERVERS)
START_SECONDS = 180
log = logging.getLogger(__name__)


def start(service: str, stack: Stack) -> None:
    """Start a service as a detached process and record it, unless it is already running."""
    records = processes.read_records(stack.state_dir)
    if find_process(records.get(service)):
        return
    output = stack.log_file(service)
    output.parent.mkdir(exist_ok=True)
    if output.exists():
        output.replace(output.with_suffix(".log.1"))
    # If this fails, the error names the file; posix_spawn's would name the program.
    output.touch(mode=0o600)
    server = server_environment(stack) if service == "prefect" else {}
    pid = os.posix_spawn(
        sys.executable,
        _python(*_command(service, stack)),
        service_environment(stack) | server,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        # `make run &` ignores SIGINT; a worker that inherits this does not end on SIGTERM either.
        setsigdef=[signal.SIGINT],
    )
    records[service] = {**identify(pid), "port": port_of(service, stack)}
    try:
        processes.write_records(stack.state_dir, records)
    except OSError:
        # No `down` would find the process.
        if process := find_process(records[service]):
            processes.end([process])
        raise


def wait_until_healthy(service: str, stack: Stack) -> None:
    """Wait up to START_SECONDS until a service is healthy."""
    record, output = processes.read_records(stack.state_dir)[service], stack.log_file(service)
    deadline = time.monotonic() + START_SECONDS
    while True:
        if not find_process(record):
            text = _tail(output.read_text(errors="replace"))
            raise StageError(f"{service}: exited during startup; last lines of {output}:\n{text}")
        if is_healthy(service, stack):
            where = f"{url}, " if (url := url_of(service, stack)) else ""
            return log.info("%s: %spid %d", service, where, record["pid"])
        if time.monotonic() > deadline:
            raise StageError(f"{service}: not healthy after {START_SECONDS} s; see {output}")
        time.sleep(0.2)


def is_healthy(service: str, stack: Stack) -> bool:
    """Return whether a service responds, or for the worker whether it is online."""
    with contextlib.suppress(StageError, OSError):
        if service == "mlflow":
            prefect_api.request("GET", f"{stack.mlflow_url}/health")
            return True
        if service == "prefect":
            stack.prefect("GET", "/ready")
            return True
        if service == "keeper":
            return find_process(processes.read_records(stack.state_dir).get("keeper")) is not None
        return is_online(stack)
    return False


def is_online(stack: Stack) -> bool:
    """Return whether the current worker is online; Prefect reports a killed one as online for 90 s."""
    process = find_process(processes.read_records(stack.state_dir).get("worker"))
    if process is None:
        return False
    return any(
        worker["status"] == "ONLINE"
        and datetime.datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() > process.create_time()
        for worker in stack.prefect("POST", f"/work_pools/{POOL}/workers/filter", {})
    )


def url_of(service: str, stack: Stack) -> str:
    """Return the URL of a service's UI; empty if it has none."""
    return {"prefect": stack.prefect_ui, "mlflow": stack.mlflow_url}.get(service, "")


def port_of(service: str, stack: Stack) -> int:
    """Return the port of a service, 0 if it has none."""
    return {"prefect": stack.prefect_port, "mlflow": stack.mlflow_port}.get(service, 0)


def _command(service: str, stack: Stack) -> list[str]:
    """Return the module and the arguments that run a service in the foreground."""
    port = ["--port", str(port_of(service, stack))]
    return {
        "prefect": ["infra.local.prefect_server", *port],
        "mlflow": [
            *("mlflow", "server", "--host", HOST, *port),
            *("--workers", "1", "--uvicorn-opts", "--no-access-log"),
            *("--backend-store-uri", f"sqlite:///{stack.state_dir / DATABASE}"),
            *("--artifacts-destination", str(stack.state_dir / ARTIFACTS)),
            *("--allowed-hosts", f"localhost,localhost:*,{HOST},{HOST}:*"),
        ],
        "keeper": ["infra.local.keeper"],
        "worker": ["infra.local.outlast", "prefect", "worker", "start", "--name", POOL, "--pool", POOL],
    }[service]


def _python(*arguments: str) -> list[str]:
    """Return the command that runs a module; -P keeps the current folder off the import path."""
    return [sys.executable, "-P", "-m", *arguments]


def call(stack: Stack, *arguments: str) -> None:
    """Run a module to completion, and require that it succeeds."""
    done = subprocess.run(
        _python(*arguments),
        env=service_environment(stack) | {"COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        failure = f"{' '.join(arguments)}: exit code {done.returncode}"
        raise StageError(f"{failure}; fix the error in its last lines:\n{_tail(done.stdout)}")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])


def create_mlflow_database(stack: Stack) -> None:
    """Create the tables under a temporary name, so that an incomplete database is never used."""
    database = stack.state_dir / DATABASE
    if not database.exists():
        fresh = database.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        call(stack, "mlflow", "db", "upgrade", f"sqlite:///{fresh}")
        if not database.exists():  # a manually run stage may have created it first
            fresh.replace(database)
