"""What no run, version or user needs any more is removed from repository, cache and MLflow."""

import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from nightshift.pipeline import workspaces
from nightshift.pipeline.graph import locked_outputs, parse_outputs
from nightshift.pipeline.leases import lease
from nightshift.pipeline.workspaces import git
from nightshift.registry import retention, versions
from nightshift.registry.retention import drop_deleted_runs, drop_old_runs
from nightshift.tracking.runs import experiment_id, tracking_uri
from tests.helpers.checkouts import BIN

# The snapshot takes one more file each time, and the derived stage changes with it.
STAGES = {
    "snapshot": {
        "cmd": "mkdir -p data/raw && cp arrives/* data/raw",
        "outs": [{"data/raw": {"persist": True}}],
    },
    "pack": {"cmd": "wc -c data/raw/* > data/packed", "deps": ["data/raw"], "outs": ["data/packed"]},
}
USER = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
RUNS = ("aaaaaaa1", "aaaaaaa2", "aaaaaaa3", "aaaaaaa4")


@pytest.fixture(scope="module")
def four_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a checkout after four runs of a deployment, of which the first registered a version."""
    folder = tmp_path_factory.mktemp("retention")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
        enter(folder, patch)
        Path("arrives").mkdir()
        Path(".gitignore").write_text("/data/\n/.nightshift/\n")
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
        keep_runs(2)
        git("init", "-q")
        subprocess.run(["dvc", "init", "-q"], check=True)
        git("add", "-A")
        git(*USER, "commit", "-qm", "first")
        for run in RUNS:
            work(folder, run, patch)
        register(RUNS[0])
    for path in (folder / ".dvc" / "cache").rglob("*"):
        os.utime(path, (time.time() - 3 * 86_400,) * 2)
    return folder


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Enter a checkout with its own state."""
    patch.chdir(folder)
    patch.setenv("NIGHTSHIFT_HOME", str(folder / ".nightshift"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        patch.delenv(name, raising=False)


@pytest.fixture
def checkout(four_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the checkout."""
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    enter(shutil.copytree(four_runs, tmp_path / "checkout"), monkeypatch)
    return Path.cwd()


def keep_runs(number: int | None) -> None:
    nightly = {"min_expected_gain": 0.0, "keep_runs": number}
    registry = {"model_name": "m", "experiment": "e", "approval": "auto"}
    Path("params.yaml").write_text(yaml.safe_dump({"nightly": nightly, "registry": registry}))


def work(folder: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stages in a workspace after a file arrived, and publish the results."""
    (folder / "arrives" / run).write_text(run)
    git(*USER, "add", "arrives")
    git(*USER, "commit", "-qm", run)
    workspaces.main(run)
    (place,) = workspaces.workspaces().glob(f"*-{run}")
    monkeypatch.chdir(place)
    subprocess.run(["dvc", "repro", "-q", "--force"], check=True)
    assert workspaces.publish("ended")
    workspaces.remove()
    monkeypatch.chdir(folder)


def register(run: str) -> str:
    """Register a version from a run, with its lineage; return the MLflow run."""
    client, name = versions.open_registry()
    logged = client.create_run(experiment_id(client)).info
    client.log_text(logged.run_id, lock(run), "model/artifacts/lineage/dvc.lock")
    client.create_registered_model(name)
    tags = {versions.DIGEST: "d", "nightshift.flow_run": f"{run}-1111"}
    client.create_model_version(name, f"{logged.artifact_uri}/model", logged.run_id, tags=tags)
    return str(logged.run_id)


def branches() -> list[str]:
    found = git("for-each-ref", "--format=%(refname)", workspaces.BRANCHES).splitlines()
    return sorted(one[-8:] for one in found)


def lock(run: str) -> str:
    """Return the dvc.lock on the branch of a run."""
    (branch,) = git("for-each-ref", "--format=%(refname)", f"{workspaces.BRANCHES}/*-{run}").splitlines()
    return git("show", f"{branch}:dvc.lock")


def in_cache(oid: str) -> bool:
    return Path(".dvc/cache/files/md5", oid[:2], oid[2:]).is_file()


def outputs(run: str) -> dict[str, str]:
    """Return output -> MD5 of a run."""
    return {path: oid for stage in parse_outputs(lock(run)).values() for path, oid in stage.items()}


@pytest.mark.usefixtures("checkout")
def test_old_runs_are_removed_but_for_what_versions_need() -> None:
    before = {run: outputs(run) for run in RUNS}
    drop_old_runs()
    assert branches() == [RUNS[0], RUNS[2], RUNS[3]]
    assert {run: in_cache(oid["data/raw"]) for run, oid in before.items()} == dict(
        zip(RUNS, (True, False, True, True), strict=True)
    )
    assert {run: in_cache(oid["data/packed"]) for run, oid in before.items()} == dict(
        zip(RUNS, (False, False, True, True), strict=True)
    )
    # The files within the folder of the version, and of the newest run.
    for run in (RUNS[0], RUNS[3]):
        Path("dvc.lock").write_text(lock(run))
        subprocess.run(["dvc", "checkout", "-q", "data/raw"], check=True)
        assert len(list(Path("data/raw").iterdir())) == {RUNS[0]: 1, RUNS[3]: 4}[run]


@pytest.mark.usefixtures("checkout")
def test_what_a_commit_or_the_checkout_needs_stays() -> None:
    second = outputs(RUNS[1])
    git("tag", "wanted", git("for-each-ref", "--format=%(objectname)", f"{workspaces.BRANCHES}/*-{RUNS[1]}"))
    drop_old_runs()
    assert RUNS[1] not in branches()
    assert all(map(in_cache, second.values()))


def test_the_lock_of_the_checkout_and_of_a_workspace_stay(checkout: Path) -> None:
    second = outputs(RUNS[1])
    kept = checkout / ".nightshift" / "workspaces" / "failed"
    kept.mkdir(parents=True)
    (kept / "dvc.lock").write_text(lock(RUNS[1]))
    drop_old_runs()
    assert all(map(in_cache, second.values()))
    keep_runs(1)
    (kept / "dvc.lock").rename("dvc.lock")
    drop_old_runs()
    assert branches() == [RUNS[0], RUNS[3]]
    assert all(map(in_cache, second.values()))
    assert locked_outputs()


@pytest.mark.usefixtures("checkout")
def test_a_branch_of_the_user_is_none_of_a_run_whatever_its_name() -> None:
    second = outputs(RUNS[1])
    ended = git("for-each-ref", "--format=%(objectname)", f"{workspaces.BRANCHES}/*-{RUNS[1]}")
    tree = git("rev-parse", f"{ended}^{{tree}}")
    git("branch", "runs/2020-01-01-mine", git(*USER, "commit-tree", tree, "-m", "mine", moment=10**9))
    drop_old_runs()
    assert git("branch", "--list", "runs/2020-01-01-mine")
    assert RUNS[1] not in branches()
    assert all(map(in_cache, second.values()))


@pytest.mark.usefixtures("checkout")
def test_young_objects_stay() -> None:
    second = outputs(RUNS[1])
    path = Path(".dvc/cache/files/md5", second["data/packed"][:2], second["data/packed"][2:])
    path.touch()
    drop_old_runs()
    assert (in_cache(second["data/packed"]), in_cache(second["data/raw"])) == (True, False)


@pytest.mark.usefixtures("checkout")
def test_nothing_is_removed_while_a_run_is_active_or_without_a_limit() -> None:
    with lease("bbbbbbb1-x"):
        drop_old_runs()
    assert branches() == list(RUNS)
    keep_runs(None)
    drop_old_runs()
    keep_runs(4)
    drop_old_runs()
    assert branches() == list(RUNS)


def test_a_cache_that_others_may_use_keeps_everything(checkout: Path, tmp_path: Path) -> None:
    second = outputs(RUNS[1])
    shared = tmp_path / "shared"
    shutil.move(checkout / ".dvc" / "cache", shared)
    subprocess.run(["dvc", "cache", "dir", "--local", shared], check=True)
    drop_old_runs()
    assert branches() == [RUNS[0], RUNS[2], RUNS[3]]
    oid = second["data/packed"]
    assert (shared / "files" / "md5" / oid[:2] / oid[2:]).is_file()


def test_runs_that_were_deleted_long_ago_are_removed_with_their_files(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep_runs(None)
    client = MlflowClient(tracking_uri())
    experiment = experiment_id(client)
    gone, young, kept = (client.create_run(experiment).info for _ in range(3))
    for run in (gone, young, kept):
        client.log_text(run.run_id, "x", "x.txt")
    drop_deleted_runs()
    client.delete_run(gone.run_id)
    drop_deleted_runs()
    # Restored in time.
    client.restore_run(gone.run_id)
    client.delete_run(gone.run_id)
    monkeypatch.setattr(retention, "DELETED_DAYS", "0.0000001")
    drop_deleted_runs()
    left = sorted(path.parent.parent.name for path in (in_tmp / ".nightshift").rglob("x.txt"))
    assert left == sorted([young.run_id, kept.run_id])
    # The run of a version was deleted by mistake.
    client.create_registered_model("m")
    tags = {versions.DIGEST: "d"}
    client.create_model_version("m", f"{kept.artifact_uri}/x.txt", kept.run_id, tags=tags)
    client.delete_run(kept.run_id)
    client.delete_run(young.run_id)
    with caplog.at_level(logging.WARNING):
        drop_deleted_runs()
    assert f"versions were registered from some: {kept.run_id}" in caplog.text
    client.restore_run(kept.run_id)
    drop_deleted_runs()
    assert [path.parent.parent.name for path in (in_tmp / ".nightshift").rglob("x.txt")] == [kept.run_id]
