"""Find what keeps nights from running, and say what to do: each fault is one line with its remedy."""

import contextlib
import importlib.metadata
import shutil
import sqlite3
import subprocess
import tempfile
import time
import zoneinfo
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from infra.local import notify, processes, runs, services, stack
from infra.local.settings import MARK, Stack
from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError, PipelineError, first_line
from nightshift.core.paths import RAW
from nightshift.core.state import DATABASE, state_dir
from nightshift.pipeline.graph import GRAPH, LOCK, locked_outputs
from nightshift.pipeline.leases import find_process, lease_holder
from nightshift.tracking.runs import git_commit
from tasks.check import check

# Below this, one more night may not fit.
LOW_GIB = 2
DATABASES = ("prefect/prefect.db", DATABASE)
LOCK_SECONDS = 5
# How late a run may start though nothing else runs, and from how far in the future a file may be.
LATE, AHEAD = timedelta(minutes=15), timedelta(minutes=5)
RESTART = "`nightshift down` and `nightshift up`"
Check = Callable[[], Iterator[str]]


def examine() -> list[str]:
    """Return every fault; empty if all is well."""
    checks: list[Check] = [check_packages, check_project, check_git, check_dvc, check_state, check_clock]
    found = [fault for one in checks for fault in guarded(one)]
    try:
        running = stack.read_stack(state_dir())
    except (PipelineError, ValueError) as err:
        return [
            *found,
            f"{state_dir()}/stack.json: {first_line(err)}; end the servers by hand, delete the file",
        ]
    found += guarded(lambda: check_services(running))
    found += guarded(check_databases)
    if services.is_healthy("prefect", running):
        for part in (check_deployments, check_queues, check_runs, check_messages):
            found += guarded(lambda part=part: part(running))  # type: ignore[misc]
    return found


def guarded(one: Check) -> list[str]:
    """Return the faults of a check; one that fails is a fault, too."""
    faults: list[str] = []
    try:
        faults.extend(one())
    except Exception as err:  # noqa: BLE001 - the other checks must run
        faults.append(
            f"doctor: a check failed: {first_line(err)}; fix that first, then run `nightshift doctor`"
        )
    return faults


def check_packages() -> Iterator[str]:
    """Check git, and the versions of the installed packages."""
    if shutil.which("git") is None:
        yield "git is not on PATH; install it"
    for text in importlib.metadata.requires("nightshift-finetune") or ():
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not needed.specifier.contains(found, prereleases=True):
            yield f"{needed.name} is {found}, but needs {needed.specifier}; run `make clean` and `make run`"


def check_project() -> Iterator[str]:
    """Check the files that describe what runs: params.yaml, prefect.yaml, prefect.toml."""
    try:
        check(read_params())
    except PipelineError as err:
        yield f"{err}; fix it, `python -m tasks.check` lists what is left"
    declared = Path("prefect.yaml")
    if not declared.is_file():
        yield f"{declared} is not in {Path.cwd()}; run from the folder that contains it"
        return
    schedules = [
        (deployment["name"], schedule)
        for deployment in yaml.safe_load(declared.read_text(encoding="utf-8"))["deployments"]
        for schedule in deployment.get("schedules", ())
    ]
    if not any(schedule.get("active", True) for name, schedule in schedules if name != runs.JANITOR[1]):
        yield f"{declared}: no deployment has an active schedule, so no night starts; add one to `nightly`"
    for name, schedule in schedules:
        zone = schedule.get("timezone", "UTC")
        if zone not in zoneinfo.available_timezones():
            yield f"{declared}: {name}: there is no timezone {zone!r}; write one such as Europe/Berlin"
    toml = stack.PREFECT_TOML
    if toml.is_file() and not toml.read_text(encoding="utf-8").startswith(MARK):
        yield f"{toml} was not written by `nightshift up`, which refuses to replace it; move or rename it"


def check_git() -> Iterator[str]:
    """Check that a night can clone the folder."""
    if git_commit() == "none":
        yield f"{Path.cwd()} has no git commit to clone; run `git init`, `git add -A`, `git commit`"
        return
    done = subprocess.run(
        ["git", "diff", "--name-only", "--diff-filter=U"], capture_output=True, text=True, check=False
    )
    if done.stdout:
        yield f"{', '.join(done.stdout.split())}: a merge is unfinished; resolve it before a night trains it"


def check_dvc() -> Iterator[str]:
    """Check DVC's files, cache and remotes."""
    if not Path(".dvc").is_dir():
        yield f"{Path.cwd()} is no DVC repository; run `git checkout .dvc`"
        return
    for path in (GRAPH, LOCK):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            problem = "" if isinstance(values, dict) else "no YAML mapping"
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            problem = first_line(err)
        if problem:
            yield f"{path}: {problem}; run `git checkout {path}`, or take it from a branch of runs/"
            return
    if git_commit() == "none":
        return
    from dvc.repo import Repo  # type: ignore[import-untyped]

    with Repo() as repo:
        cache = Path(repo.cache.local.path)
        for name, remote in repo.config["remote"].items():
            if not remote.get("verify"):
                yield (f"DVC remote {name} accepts damaged files; run `dvc remote modify {name} verify true`")
        for oid in locked_outputs().get("snapshot", {}).values():
            if not Path(repo.cache.local.oid_to_path(oid)).is_file() and not RAW.is_dir():
                yield f"{LOCK} lists data that DVC's cache lacks; run `dvc pull`"
                break
    yield from check_writable(cache if cache.is_dir() else Path(".dvc"), "DVC's cache")


def check_state() -> Iterator[str]:
    """Check the state folder: disk, rights, secrets."""
    home = state_dir()
    if not home.is_dir():
        yield f"{home} does not exist yet; run `nightshift up`"
        return
    yield from check_writable(home, "the state folder")
    if (free := shutil.disk_usage(home).free / 2**30) < LOW_GIB:
        yield f"{home}: {free:.1f} GiB are free, less than {LOW_GIB}; free disk space, or set NIGHTSHIFT_HOME"
    auth = home / "prefect-auth"
    if not auth.is_file():
        yield f"{auth} is missing, so nothing can log in to Prefect; run {RESTART}"
    elif auth.stat().st_mode & 0o077:
        yield f"{auth} can be read by other users; run `chmod 600 {auth}`"


def check_writable(folder: Path, what: str) -> Iterator[str]:
    """Check that a file can be written in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as err:
        yield f"{folder}: {what} cannot be written: {err.strerror}; free disk space or fix the permissions"


def check_clock() -> Iterator[str]:
    """Check that the clock is not behind what was written before: nights would start late, or twice."""
    newest = max((path.stat().st_mtime for path in state_dir().glob("*")), default=0.0)
    ahead = timedelta(seconds=newest - time.time())
    if ahead > AHEAD:
        yield f"the clock is {ahead} behind the newest file in {state_dir()}; set it, such as by NTP"


def check_services(running: Stack) -> Iterator[str]:
    """Check that the servers and the worker run and respond, or why not."""
    records = processes.read_records(running.state_dir)
    if not records:
        yield "the servers were not started; run `nightshift up`"
        return
    for service, record in records.items():
        if find_process(record):
            if not services.is_healthy(service, running):
                yield f"{service} (pid {record['pid']}) does not respond; run {RESTART}"
        else:
            holder = processes.port_holder(record["port"]) if record["port"] else None
            taken = f", and its port {record['port']} is in use: {holder}" if holder else ""
            yield f"{service} has ended{taken}; see {running.log_file(service)}, then run `nightshift up`"
    for service in set(services.SERVICES) - set(records):
        yield f"{service} was not started; run `nightshift up`"
    # The worker's log repeats the errors of runs, which are theirs.
    found = {
        name: [one for one in errors if "Flow run '" not in one] for name, errors in stack.problems().items()
    }
    for service, errors in ((name, errors) for name, errors in found.items() if errors):
        yield f"{running.log_file(service)}: {len(errors)} error(s), the last: {errors[-1]}; run {RESTART}"


def check_databases() -> Iterator[str]:
    """Check that the databases are whole and not locked."""
    for name in DATABASES:
        path = state_dir() / name
        if not path.is_file():
            continue
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as database:
                (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
        except sqlite3.Error as err:
            found = str(err)
        if "locked" in found:
            yield f"{path}: a process holds its lock for more than {LOCK_SECONDS} s; end it (`fuser {path}`)"
        elif found != "ok":
            yield f"{path} is damaged ({found}); run `nightshift down`, restore a copy, `nightshift up`"


def check_deployments(running: Stack) -> Iterator[str]:
    """Check that Prefect has what prefect.yaml declares, and plans nights."""
    if not (file := Path("prefect.yaml")).is_file():
        return
    declared = yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]
    known = {(one["entrypoint"], one["name"]): one for one in runs.read_deployments(running)}
    for one in declared:
        found = known.get((one["entrypoint"], one["name"]))
        if found is None:
            yield f"Prefect lacks the deployment {one['name']} of {one['entrypoint']}; run `nightshift up`"
            continue
        if found["paused"]:
            yield f"the deployment {one['name']} is paused; resume it in Prefect, or run `nightshift up`"
        if one.get("schedules") and not any(schedule["active"] for schedule in found["schedules"]):
            yield f"the schedule of {one['name']} is inactive in Prefect; run `nightshift up`"
    if not runs.next_runs(running, limit=1):
        yield f"Prefect plans no night; its scheduler may have failed, see prefect.log; run {RESTART}"


def check_queues(running: Stack) -> Iterator[str]:
    """Check that no pool or queue is paused, and that the janitor is called for silent runs."""
    pool = running.prefect("GET", f"/work_pools/{runs.POOL}")
    if pool["is_paused"]:
        yield f"the work pool is paused, so no run starts; run `prefect work-pool resume {runs.POOL}`"
    for queue in running.prefect("POST", f"/work_pools/{runs.POOL}/queues/filter", {}):
        if queue["is_paused"]:
            yield f"the work queue {queue['name']} is paused; run `prefect work-queue resume {queue['name']}`"
        if queue["concurrency_limit"] != 1:
            limit = queue["concurrency_limit"]
            yield f"the work queue {queue['name']} lets {limit} runs start at once; run `nightshift up`"
    found = running.prefect(
        "POST", "/automations/filter", {"automations": {"name": {"any_": [runs.AUTOMATION]}}}
    )
    if not found:
        yield f"the automation {runs.AUTOMATION} is missing, so dead runs stay; run `nightshift up`"
    elif not found[0]["enabled"]:
        yield f"the automation {runs.AUTOMATION} is disabled, so dead runs stay; enable it in Prefect"


def check_runs(running: Stack) -> Iterator[str]:
    """Check that no run is dead or stuck, and that the newest night did not fail."""
    active = runs.active_runs(running)
    processes_of = {run for run, _ in runs.run_processes(running.state_dir)}
    for run in active:
        holder = lease_holder(run["id"])
        if holder == "dead" or (holder is None and run["id"] not in processes_of and is_late(run)):
            yield f"run {run['name']} has no process any more; run `prefect deployment run janitor/local`"
    body = {
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "work_pools": {"name": {"any_": [runs.POOL]}},
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 1,
    }
    for run in running.prefect("POST", "/flow_runs/filter", body):
        if is_late(run) and not active:
            yield f"run {run['name']} is late though nothing runs; run {RESTART}"
    body = {
        "flows": {"name": {"any_": [notify.FLOW]}},
        "flow_runs": {"start_time": {"is_null_": False}},
        "sort": "START_TIME_DESC",
        "limit": 1,
    }
    for run in running.prefect("POST", "/flow_runs/filter", body):
        if run["state_type"] in ("FAILED", "CRASHED"):
            message = (run["state"] or {}).get("message")
            yield f"the last run, {run['name']}, {run['state_type'].lower()}: {message}; mend it, run again"


def is_late(run: dict[str, Any]) -> bool:
    """Return whether a run should have started a while ago."""
    return datetime.now(UTC) - datetime.fromisoformat(run["expected_start_time"]) > LATE


def check_messages(running: Stack) -> Iterator[str]:
    """Check that Prefect has the blocks that tell how nights end."""
    with contextlib.suppress(ConfigError):
        for block in stack.read_blocks():
            if notify.find_block(running, block) is None:
                yield f"nightly.notify: there is no block {block}; create it in Prefect's UI, under Blocks"
