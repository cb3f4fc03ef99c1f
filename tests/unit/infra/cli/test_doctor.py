"""Each injected fault is named with its remedy, and a healthy system has none."""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from infra.cli import doctor
from infra.cli.app import app
from infra.local import runs, services
from infra.local.settings import Stack
from nightshift.core.errors import StageError
from nightshift.core.files import read_json, write_json
from nightshift.pipeline.leases import identify, lease_file
from nightshift.pipeline.workspaces import git
from tests.helpers.checkouts import BIN, ROOT

HOME = Path(".nightshift")


class System:
    """A healthy checkout with a fake Prefect, which a test damages.

    Attributes:
        answers: What Prefect answers, by path.
        healthy: Services that respond.
        patch: Undone after the test.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.healthy = {*services.SERVICES}
        soon = (datetime.now(UTC) + timedelta(hours=3)).isoformat()
        declared = yaml.safe_load(Path("prefect.yaml").read_text())["deployments"]
        self.deployments = [
            {
                "id": f"{one['entrypoint']}/{one['name']}",
                "name": one["name"],
                "entrypoint": one["entrypoint"],
                "paused": False,
                "schedules": [{"active": True} for _ in one.get("schedules", ())],
            }
            for one in declared
        ]
        nightly = next(one["id"] for one in self.deployments if one["name"] == "nightly")
        self.scheduled = [{"name": "night", "expected_start_time": soon, "deployment_id": nightly}]
        self.active: list[dict[str, Any]] = []
        self.last: list[dict[str, Any]] = []
        self.pool = {"is_paused": False}
        self.queues = [{"name": "training", "is_paused": False, "concurrency_limit": 1}]
        self.automations = [{"enabled": True}]

    def prefect(self, _stack: Stack, _method: str, path: str, body: Any = None) -> Any:
        match path:
            case "/deployments/filter":
                return self.deployments
            case "/automations/filter":
                return self.automations
            case "/flow_runs/filter" if "start_time" in body["flow_runs"]:
                return self.last
            case "/flow_runs/filter":
                kinds = body["flow_runs"]["state"]["type"]["any_"]
                return self.scheduled if "SCHEDULED" in kinds else self.active
        if path.endswith("/queues/filter"):
            return self.queues
        if path.startswith("/work_pools/"):
            return self.pool
        raise StageError(f"{path}: HTTP Error 404")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a git and DVC repository with one commit."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("params.yaml", "prefect.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    git("init", "-q", folder=folder)
    subprocess.run([BIN / "dvc", "init", "-q"], cwd=folder, check=True)
    git("add", "-A", folder=folder)
    git("-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qm", "first", folder=folder)
    return folder


@pytest.fixture
def system(repository: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    shutil.copytree(repository, in_tmp, dirs_exist_ok=True)
    (HOME / "prefect").mkdir(parents=True)
    (HOME / "logs").mkdir()
    (HOME / "prefect-auth").touch(mode=0o600)
    for name in doctor.DATABASES:
        with sqlite3.connect(HOME / name) as database:
            database.execute("CREATE TABLE t (x)")
        database.close()
    records = {name: {**identify(os.getpid()), "port": 0} for name in services.SERVICES}
    write_json(HOME / "stack.json", records)
    made = System(monkeypatch)
    monkeypatch.setattr(services, "is_healthy", lambda service, _: service in made.healthy)
    monkeypatch.setattr(Stack, "prefect", _call(made))
    monkeypatch.setattr(doctor, "LOCK_SECONDS", 0.1)
    return made


def _call(made: System) -> Callable[..., Any]:
    return lambda stack, method, path, body=None: made.prefect(stack, method, path, body)


def edit(file: str, before: str, after: str) -> None:
    text = Path(file).read_text()
    assert before in text
    Path(file).write_text(text.replace(before, after))


def end(service: str, port: int = 0) -> None:
    """Let a service be one that has ended."""
    records = read_json(HOME / "stack.json")
    records[service] |= {"start_ticks": 1, "port": port}
    write_json(HOME / "stack.json", records)


def conflict(_: System) -> None:
    user = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    git("checkout", "-qb", "other")
    edit("params.yaml", "seed: 0", "seed: 1")
    git(*user, "commit", "-qam", "other")
    git("checkout", "-q", "-")
    edit("params.yaml", "seed: 0", "seed: 2")
    git(*user, "commit", "-qam", "ours")
    subprocess.run(["git", *user, "merge", "-q", "other"], check=False, capture_output=True)


def take_port(system: System) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    system.patch.setattr(system, "socket", server, raising=False)
    end("mlflow", server.getsockname()[1])


def lock(system: System) -> None:
    held = sqlite3.connect(HOME / "mlflow.db", isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    system.patch.setattr(system, "held", held, raising=False)


def version_of(system: System, package: str, version: str) -> None:
    real = importlib.metadata.version
    system.patch.setattr(
        importlib.metadata, "version", lambda name: version if name == package else real(name)
    )


def without_git(system: System) -> None:
    which = shutil.which
    system.patch.setattr(shutil, "which", lambda name: None if name == "git" else which(name))


def dead_run(_: System) -> list[dict[str, Any]]:
    write_json(lease_file("r1"), {**identify(os.getpid()), "start_ticks": 1, "host": platform.node()})
    return [{"id": "r1", "name": "one", "expected_start_time": datetime.now(UTC).isoformat()}]


EARLIER = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
FAULTS: dict[str, tuple[Callable[[System], object], str]] = {
    "package": (
        lambda s: version_of(s, "prefect", "2.0.0"),
        r"prefect is 2.0.0, but needs .*; run `make clean`",
    ),
    "git missing": (without_git, "git is not on PATH; install it"),
    "parameter": (
        lambda _: edit("params.yaml", "lora_r:", "lora_rr:"),
        "sft.lora_rr: unknown key; .*tasks.check",
    ),
    "yaml": (lambda _: Path("params.yaml").write_text("a: [1"), "params.yaml: not valid YAML"),
    "no prefect.yaml": (
        lambda _: Path("prefect.yaml").unlink(),
        "prefect.yaml is not in .*; run from the folder",
    ),
    "no schedule": (
        lambda _: edit("prefect.yaml", "slug: nightly", "slug: nightly\n        active: false"),
        "no deployment has an active schedule, so no night starts; add one",
    ),
    "timezone": (
        lambda _: edit("prefect.yaml", "Berlin", "Berlim"),
        "no timezone 'Europe/Berlim'; write one such",
    ),
    "prefect.toml": (
        lambda _: Path("prefect.toml").write_text("x = 1"),
        "prefect.toml was not written .*; move",
    ),
    "no commit": (lambda _: shutil.rmtree(".git"), "has no git commit to clone; run `git init`"),
    "merge": (conflict, "params.yaml: a merge is unfinished; resolve it"),
    "dvc": (lambda _: shutil.rmtree(".dvc"), "is no DVC repository; run `git checkout .dvc`"),
    "dvc.lock": (
        lambda _: Path("dvc.lock").write_text("<<<<<<< ours"),
        "dvc.lock: .*; run `git checkout dvc.lock`",
    ),
    "remote": (
        lambda _: subprocess.run(["dvc", "remote", "add", "-q", "store", "x"], check=True),
        "DVC remote store accepts damaged files; run `dvc remote modify store verify true`",
    ),
    "disk": (
        lambda s: s.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30)),
        "1.0 GiB are free, less than 2; free disk space, or set NIGHTSHIFT_HOME",
    ),
    "no state": (lambda _: shutil.rmtree(HOME), "does not exist yet; run `nightshift up`"),
    "no password": (
        lambda _: (HOME / "prefect-auth").unlink(),
        "prefect-auth is missing, .*; run `nightshift down`",
    ),
    "open password": (
        lambda _: (HOME / "prefect-auth").chmod(0o644),
        "can be read by other users; run `chmod 600",
    ),
    "clock": (
        lambda _: os.utime(HOME / "stack.json", (time.time() + 86_400,) * 2),
        "the clock is .* behind the newest file in .*; set it",
    ),
    "stack.json": (
        lambda _: (HOME / "stack.json").write_text("{"),
        "stack.json: .*; end the servers by hand",
    ),
    "not started": (
        lambda _: (HOME / "stack.json").unlink(),
        "the servers were not started; run `nightshift up`",
    ),
    "worker": (lambda _: end("worker"), r"worker has ended; see .*worker.log, then run `nightshift up`"),
    "port": (take_port, r"mlflow has ended, and its port \d+ is in use: pid \d+ .*run `nightshift up`"),
    "ready": (
        lambda s: s.healthy.remove("prefect"),
        r"prefect \(pid \d+\) does not respond; run `nightshift down`",
    ),
    "worker offline": (lambda s: s.healthy.remove("worker"), r"worker \(pid \d+\) does not respond; run"),
    "log": (
        lambda _: (HOME / "logs/prefect.log").write_text(
            "12:00:02.000 | ERROR   | x - the scheduler failed\n"
        ),
        r"prefect.log: 1 error\(s\), the last: .*the scheduler failed; run",
    ),
    "damaged": (
        lambda _: (HOME / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"\1" * 4096),
        r"mlflow.db is damaged \(.*\); run `nightshift down`, restore a copy",
    ),
    "locked": (lock, "mlflow.db: a process holds its lock for more than 0.1 s; end it"),
    "deployment": (
        lambda s: s.deployments.pop(0),
        "Prefect lacks the deployment prod of flows/finetune.py:finetune; run",
    ),
    "paused": (lambda s: s.deployments[2].update(paused=True), "the deployment nightly is paused; resume it"),
    "inactive": (
        lambda s: s.deployments[2].update(schedules=[{"active": False}]),
        "the schedule of nightly is inactive in Prefect; run `nightshift up`",
    ),
    "no night": (lambda s: s.scheduled.clear(), "Prefect plans no night; its scheduler may have failed"),
    "pool": (
        lambda s: s.pool.update(is_paused=True),
        "the work pool is paused, .* `prefect work-pool resume nightshift`",
    ),
    "queue": (
        lambda s: s.queues[0].update(is_paused=True),
        "queue training is paused; run `prefect work-queue resume",
    ),
    "limit": (
        lambda s: s.queues[0].update(concurrency_limit=None),
        "queue training lets None runs start at once; run",
    ),
    "no automation": (
        lambda s: s.automations.clear(),
        f"automation {runs.AUTOMATION} is missing, .*run `nightshift up`",
    ),
    "automation": (
        lambda s: s.automations[0].update(enabled=False),
        "is disabled, so dead runs stay; enable it",
    ),
    "dead run": (
        lambda s: s.active.extend(dead_run(s)),
        "run one has no process any more; run `prefect deployment run",
    ),
    "pending run": (
        lambda s: s.active.append({"id": "r2", "name": "two", "expected_start_time": EARLIER}),
        "run two has no process any more; run `prefect deployment run janitor/local`",
    ),
    "late": (
        lambda s: s.scheduled[0].update(expected_start_time=EARLIER),
        "run night is late though nothing runs; run `nightshift down`",
    ),
    "failed": (
        lambda s: s.last.append({"name": "one", "state_type": "FAILED", "state": {"message": "sft failed"}}),
        "the last run, one, failed: sft failed; mend it, run again",
    ),
    "message": (
        lambda _: edit("params.yaml", "notify: []", "notify: [slack-webhook/none]"),
        "nightly.notify: there is no block slack-webhook/none; create it",
    ),
}


def test_the_error_of_a_run_is_no_fault_of_the_worker(system: System) -> None:
    line = "12:00:02.000 | ERROR   | Flow run 'one' - Engine execution exited with unexpected exception\n"
    (HOME / "logs/worker.log").write_text(line)
    assert doctor.examine() == []
    assert system.last == []


def test_a_healthy_system_has_no_fault(system: System) -> None:
    assert doctor.examine() == []
    done = CliRunner().invoke(app, ["doctor"])
    assert (done.exit_code, done.output) == (0, "nothing is wrong\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_remedy(fault: str, system: System) -> None:
    inject, expected = FAULTS[fault]
    inject(system)
    found = doctor.examine()
    assert any(re.search(expected, one, re.DOTALL) for one in found), found
    assert not any("a check failed" in one for one in found), found


def test_a_check_that_fails_is_a_fault_and_does_not_end_the_others(system: System) -> None:
    def fail() -> Iterator[str]:
        raise RuntimeError("unexpected")
        yield

    system.patch.setattr(doctor, "check_git", fail)
    system.pool["is_paused"] = True
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
    first, second = doctor.examine()
    assert "a check failed: RuntimeError: unexpected" in first
    assert "the work pool is paused" in second
