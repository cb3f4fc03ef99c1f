"""Manage the local stack: a Prefect server, an MLflow server, one Prefect worker, and their keeper.

`up` reads `prefect.yaml` in the current directory, writes `prefect.toml` next to it, and keeps all other
files in the state folder. The services are detached processes that outlive the command. Importing
Prefect or MLflow takes seconds, so their command lines and HTTP APIs are used instead.
"""

import json
import logging
import os
import secrets
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from infra.local import prefect_api, processes, runs, services
from infra.local.notify import create_notifications
from infra.local.runs import POOL
from infra.local.service_logs import unexplained
from infra.local.services import SERVERS, SERVICES
from infra.local.settings import FOREIGN, MARK, Stack, environment, prefect_toml
from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import named_errors
from nightshift.core.ports import free_port
from nightshift.core.state import state_dir
from nightshift.pipeline.leases import find_process

PORTS = {"prefect": ("NIGHTSHIFT_PREFECT_PORT", 4200), "mlflow": ("NIGHTSHIFT_MLFLOW_PORT", 5000)}
PREFECT_TOML = Path("prefect.toml")
MIN_FREE_MIB = 100
# Tags of the registered model that hold the record of promotions; importing MLflow takes seconds.
ENTRY = "nightshift.promotion."
log = logging.getLogger(__name__)


def up() -> Stack:
    """Start the services that are not running, deploy `prefect.yaml`, and return the stack.

    Raises:
        ConfigError: `prefect.yaml` is missing, `prefect.toml` is the user's, or a set port is taken.
        StageError: The disk is full, or a service or the deployment failed; the message ends with its last
            lines.
    """
    if not Path("prefect.yaml").is_file():
        raise ConfigError(f"{Path.cwd()}: no prefect.yaml; run from the folder that contains it")
    with processes.locked(state_dir()) as home:
        _require_space(home)
        if PREFECT_TOML.exists() and not _is_own(PREFECT_TOML):
            raise ConfigError(f"{PREFECT_TOML}: not written by the stack; move or rename it")
        records = processes.read_records(home)
        for name in PORTS:
            processes.end_remains(records.get(name))
        stack = Stack(home, *(_choose_port(name, records.get(name)) for name in PORTS))
        worker = _end_lost_worker(stack, find_process(records.get("worker")))
        _create_auth(stack)
        services.start("prefect", stack)
        services.create_mlflow_database(stack)
        services.start("mlflow", stack)
        services.wait_until_healthy("prefect", stack)
        _write_private(PREFECT_TOML, prefect_toml(stack))
        runs.create_pool(stack)
        if not worker:
            runs.recover_runs(stack)
        services.start("worker", stack)
        services.wait_until_healthy("worker", stack)
        _deploy(stack)
        services.wait_until_healthy("mlflow", stack)
        services.start("keeper", stack)
        if stack.prefect("GET", f"/work_pools/{POOL}")["is_paused"]:
            log.warning("the work pool is paused, so no run starts; run `prefect work-pool resume %s`", POOL)
    _warn_of_ignored_variables(stack)
    return stack


def restart_lost() -> list[str]:
    """Start the services again that ended without `down`, on the same ports, and return their names.

    Raises:
        StageError: The disk is full, or the Prefect server does not start again.
    """
    with processes.locked(state_dir()) as home:
        records = processes.read_records(home)
        lost = [name for name in reversed(SERVERS) if name in records and not find_process(records[name])]
        if lost:
            _require_space(home)
        stack = read_stack(home)
        for name in lost:
            log.warning("%s: ended without `nightshift down`; starting it again", name)
            if name == "worker":
                services.wait_until_healthy("prefect", stack)
                runs.recover_runs(stack)
            else:
                processes.end_remains(records[name])
            services.start(name, stack)
    return lost


def down() -> list[str]:
    """End the active runs, the worker and the servers; return the names of the ended services."""
    if not state_dir().is_dir():
        log.info("nothing was running")
        return []
    with processes.locked(state_dir()) as home:
        records = processes.read_records(home)
        live = {name: found for name in SERVICES if (found := find_process(records.get(name)))}
        ended = list(live)
        if keeper := live.pop("keeper", None):
            # Alone: the services that it has started are its children.
            keeper.kill()
            keeper.wait()
        try:
            if "prefect" in live:
                runs.cancel(read_stack(home), live.get("worker"))
        except (StageError, OSError) as err:
            log.warning("the next `nightshift up` handles the active runs: %s", err)
        processes.end([live[name] for name in live if name == "worker"])
        runs.end_run_processes(home)
        processes.end([live[name] for name in live if name != "worker"])
        for name in PORTS:
            processes.end_remains(records.get(name))
        processes.remove_records(home)
        if PREFECT_TOML.exists() and _is_own(PREFECT_TOML):
            PREFECT_TOML.unlink()
    log.info("ended: %s", ", ".join(ended) or "nothing was running")
    return ended


def problems() -> dict[str, list[str]]:
    """Return service -> errors in its log that docs/operations.md does not explain."""
    return {name: found for name in SERVICES if (found := unexplained(find_log(name)))}


def find_log(service: str) -> Path:
    """Return the file with a service's output since its last start."""
    return read_stack(state_dir()).log_file(service)


def status() -> list[tuple[str, int | None, str, bool]]:
    """List (service, pid, URL, is healthy) of each service; a stopped service has no pid and no URL."""
    stack, records = read_stack(state_dir()), processes.read_records(state_dir())
    rows: list[tuple[str, int | None, str, bool]] = []
    for service in reversed(SERVICES):
        if found := find_process(records.get(service)):
            url, is_healthy = services.url_of(service, stack), services.is_healthy(service, stack)
            rows.append((service, found.pid, url, is_healthy))
        else:
            rows.append((service, None, "", False))
    return rows


def next_runs() -> list[str]:
    """Describe the next three scheduled runs; empty if the Prefect server is not running."""
    stack = read_stack(state_dir())
    if not services.is_healthy("prefect", stack):
        return []
    return [f"{start:%a %Y-%m-%d %H:%M} {name}" for start, name in runs.next_runs(stack, limit=3)]


def active_runs() -> list[dict[str, Any]]:
    """Return the runs in progress; empty if the Prefect server is not running."""
    stack = read_stack(state_dir())
    return runs.active_runs(stack) if services.is_healthy("prefect", stack) else []


def free_space() -> int:
    """Return the free bytes on the disk of the state folder."""
    home = state_dir()
    return shutil.disk_usage(home if home.is_dir() else home.parent).free


def find_champion() -> str | None:
    """Describe the champion and since when it is; None if there is none, or MLflow is not running."""
    for entry in reversed(_read_record()):
        if entry["action"] != "acknowledge" and entry["champion"] is not None:
            since = datetime.fromisoformat(entry["moment"]).astimezone()
            return f"version {entry['champion']} since {since:%a %Y-%m-%d %H:%M} ({entry['action']})"
    return None


def find_waiting() -> int | None:
    """Return the version that awaits approval; None if there is none, or MLflow is not running."""
    found = _read_registry("alias", alias="challenger")
    return int(found["model_version"]["version"]) if found else None


def _read_record() -> list[dict[str, Any]]:
    """Return the record of promotions, oldest first, unverified; see `nightshift.registry.record`."""
    found = _read_registry("get")
    tags = {tag["key"]: tag["value"] for tag in found["registered_model"].get("tags", ())} if found else {}
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(ENTRY)]


def _read_registry(what: str, **query: str) -> dict[str, Any] | None:
    """Ask MLflow about the registered model; None if it does not have it, or MLflow is not running."""
    stack = read_stack(state_dir())
    if not services.is_healthy("mlflow", stack):
        return None
    named = urlencode({"name": read_params()["registry"]["model_name"], **query})
    # The answer is HTTP error 404 if there is none.
    with suppress(StageError):
        url = f"{stack.mlflow_url}/api/2.0/mlflow/registered-models/{what}?{named}"
        found: dict[str, Any] = prefect_api.request("GET", url)
        return found
    return None


def _deploy(stack: Stack) -> None:
    """Apply prefect.yaml, and what depends on its deployments."""
    services.call(stack, "prefect", "--no-prompt", "deploy", "--all")
    runs.end_schedules(stack, Path("prefect.yaml"))
    runs.limit_queues(stack)
    runs.schedule_missed_nights(stack, datetime.now(UTC))
    runs.create_automation(stack)
    create_notifications(stack, read_blocks())


def read_blocks() -> list[str]:
    """Return the notification blocks of params.yaml; none without the file, or with a wrong one."""
    try:
        blocks: list[str] = read_params().get("nightly", {}).get("notify", [])
    except ConfigError:
        return []
    return blocks


def _require_space(home: Path) -> None:
    """Check that the services can write, whose own errors on a full disk are long tracebacks.

    Raises:
        StageError: The disk of the state folder is full.
    """
    free = shutil.disk_usage(home).free // 2**20
    if free < MIN_FREE_MIB:
        raise StageError(
            f"{home}: the disk has {free} MiB left, the servers need {MIN_FREE_MIB}; free disk space, or set "
            "NIGHTSHIFT_HOME to a folder on another disk"
        )


def _is_own(path: Path) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").startswith(MARK)


def read_stack(home: Path) -> Stack:
    """Return the stack of a state folder with the last ports of its servers; 0 before the first."""
    return Stack(home, *(int(processes.read_records(home).get(name, {}).get("port", 0)) for name in PORTS))


def _choose_port(service: str, record: processes.Record | None) -> int:
    """Return the port of a running service, else the requested, last or default port, or a free one."""
    variable, default = PORTS[service]
    named = os.environ.get(variable, "")
    if named and not (named.isdecimal() and 0 < int(named) < 65536):
        raise ConfigError(f"{variable}: must be a port from 1 to 65535, got {named!r}")
    if record and find_process(record):
        if named and int(named) != record["port"]:
            log.warning(
                "%s stays on port %d; to change it, run `nightshift down` first", service, record["port"]
            )
        return int(record["port"])
    wanted = int(named or (record or {}).get("port") or default)
    if not (holder := processes.port_holder(wanted)):
        return wanted
    if named:
        raise ConfigError(
            f"{variable}: port {wanted} is in use: {holder}; end that process or choose another port"
        )
    port = free_port()
    log.info("%s: port %d is in use: %s; using %d", service, wanted, holder, port)
    return port


def _warn_of_ignored_variables(stack: Stack) -> None:
    """Warn about the variables of the user's shell that the stack ignores."""
    ours = environment(stack)
    ignored = [
        name
        for name, value in sorted(os.environ.items())
        if name.startswith(FOREIGN) and not name.startswith("PREFECT__") and ours.get(name) != value
    ]
    if ignored:
        log.warning(
            "the stack ignores %s, but `prefect` and `mlflow` commands in this shell use them",
            ", ".join(ignored),
        )


def _create_auth(stack: Stack) -> None:
    """Create the `user:password` of Prefect's API, unless it exists."""
    if not stack.auth_file.is_file():
        _write_private(stack.auth_file, f"nightshift:{secrets.token_urlsafe(24)}")


def _write_private(path: Path, text: str) -> None:
    """Write a file with a secret; no other user can read it, not even while it is written."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600, exist_ok=False)
    with named_errors(path):
        fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _end_lost_worker(stack: Stack, worker: psutil.Process | None) -> psutil.Process | None:
    """End a worker that is connected to an outdated address; return the worker if it may stay.

    Raises:
        ConfigError: A live run is connected to that address too.
    """
    before = read_stack(stack.state_dir)
    if before == stack:
        return worker
    if runs.run_processes(stack.state_dir):
        raise ConfigError(
            f"a run is active and reports to {before.prefect_ui} and {before.mlflow_url}, but another "
            "program uses one of these ports; free it, or end the run with `nightshift down`"
        )
    processes.end([worker] if worker else [])
    return None
