"""A run of a deployment works in a clone: the checkout does not change, and nothing that arrived is lost."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nightshift.core.errors import StageError
from nightshift.core.files import write_json
from nightshift.core.paths import GATE, METRICS
from nightshift.core.state import user_path
from nightshift.pipeline import workspaces
from nightshift.pipeline.workspaces import git
from tasks.snapshot.sources.folders import resolve
from tests.helpers.checkouts import BIN

# Stands in for the snapshot: adds a shard with the text in the file `arrives`, unless it has one.
SNAPSHOT = """
from pathlib import Path
raw = Path("data/raw/mine")
raw.mkdir(parents=True, exist_ok=True)
text = Path("arrives").read_text()
if text not in [shard.read_text() for shard in raw.iterdir()]:
    (raw / f"{len(list(raw.iterdir())) + 1:06d}.jsonl").write_text(text)
"""
GRAPH = "stages: {snapshot: {cmd: python snapshot.py, outs: [{data/raw: {persist: true}}]}}\n"
USER = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")


@pytest.fixture
def checkout(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a checkout with one shard."""
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    folder = in_tmp / "the checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(folder / ".nightshift"))
    for name, text in {
        ".gitignore": "/data/\n/.nightshift/\n/ignored/\n",
        "dvc.yaml": GRAPH,
        "params.yaml": "sft: {seed: 1}\n",
        "snapshot.py": SNAPSHOT,
    }.items():
        Path(name).write_text(text)
    git("init", "-q")
    subprocess.run(["dvc", "init", "-q"], check=True)
    git("add", "-A")
    git(*USER, "commit", "-qm", "first")
    arrive("one")
    return folder


def arrive(text: str) -> None:
    """Take a snapshot in the current folder after a text arrived at its source."""
    Path("arrives").write_text(text)
    subprocess.run(["dvc", "repro", "-q", "--force", "snapshot"], check=True)


def make(monkeypatch: pytest.MonkeyPatch, run: str = "00000001-x") -> Path:
    """Make the workspace of a run, and enter it."""
    workspaces.main(run)
    (folder,) = workspaces.workspaces().glob(f"*-{run[:8]}")
    monkeypatch.chdir(folder)
    return folder


def shards(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "data/raw/mine").iterdir())}


def test_a_workspace_has_the_commit_and_the_data_of_the_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git("rev-parse", "HEAD")
    folder = make(monkeypatch)
    assert git("rev-parse", "HEAD") == head
    assert workspaces.edited_files() == []
    assert shards(folder) == {"000001.jsonl": "one"}
    assert workspaces.checkout() == checkout
    # Beside the checkout, where params.yaml says, not beside the workspace.
    outside = checkout.parent / "exports" / "a.jsonl"
    outside.parent.mkdir()
    outside.write_text("")
    (Path.cwd().parent / "exports").mkdir()
    assert [resolve(one) for one in ("../exports/a.jsonl", "../exports")] == [
        (checkout / "../exports/a.jsonl", True),
        (checkout / "../exports", True),
    ]
    assert user_path("../exports/*.jsonl") == checkout / "../exports/*.jsonl"
    assert user_path("arrives") == Path("arrives")
    # The cache is shared: what the checkout has computed is not computed again.
    assert subprocess.run(["dvc", "status"], capture_output=True, text=True, check=True).stdout == (
        "Data and pipelines are up to date.\n"
    )


def test_uncommitted_edits_are_part_of_the_commit_and_stay_where_they_are(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("params.yaml").write_text("sft: {seed: 2}\n")
    Path("staged.txt").write_text("staged")
    git("add", "staged.txt")
    before = git("status", "--porcelain"), git("rev-parse", "HEAD"), Path(".git/index").read_bytes()
    folder = make(monkeypatch)
    assert (folder / "params.yaml").read_text() == "sft: {seed: 2}\n"
    assert workspaces.edited_files() == ["params.yaml", "staged.txt"]
    monkeypatch.chdir(checkout)
    index = Path(".git/index").read_bytes()
    assert (git("status", "--porcelain"), git("rev-parse", "HEAD"), index) == before
    assert git("branch", "--format=%(refname:short)") in ("main", "master")


def test_files_that_git_does_not_know_are_linked(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own/a.jsonl", "ignored/b.jsonl", "data/mine.jsonl", ".hidden/c", "code.py", "data/gate/g"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    folder = make(monkeypatch)
    for name in ("own/a.jsonl", "ignored/b.jsonl", "data/mine.jsonl"):
        assert (folder / name).read_text() == name
    assert not any((folder / name).exists() for name in (".hidden", "code.py", "data/gate", ".nightshift"))
    # A committed file in data lists its neighbours one by one.
    monkeypatch.chdir(checkout)
    git("add", "--force", "data/mine.jsonl")
    git(*USER, "commit", "-qm", "data")
    folder = make(monkeypatch, "00000002-x")
    assert not (folder / "data/raw").is_symlink()
    assert not (folder / "data/gate").exists()


def test_the_next_run_continues_from_the_branch_of_the_last(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(monkeypatch)
    assert workspaces.publish("nothing new") is None
    arrive("two")
    for file in (METRICS, GATE):
        write_json(file, {"of": file.stem})
    assert workspaces.publish("held") == f"runs/{folder.name}"
    workspaces.remove()
    assert Path.cwd() == checkout
    assert not folder.exists()
    branch = f"runs/{folder.name}"
    assert git("rev-parse", f"{branch}^") == git("rev-parse", "HEAD")
    assert git("diff", "--name-only", "HEAD", branch).split() == ["dvc.lock", "metrics.json"]
    assert shards(checkout) == {"000001.jsonl": "one"}
    assert git("status", "--porcelain") == "?? arrives\n?? dvc.lock"
    second = make(monkeypatch, "00000002-x")
    assert shards(second) == {"000001.jsonl": "one", "000002.jsonl": "two"}
    assert workspaces.publish("nothing new") is None


def test_shards_that_only_the_checkout_has_are_added(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch)
    arrive("two")
    workspaces.publish("night")
    workspaces.remove()
    arrive("three")
    assert shards(checkout) == {"000001.jsonl": "one", "000002.jsonl": "three"}
    second = make(monkeypatch, "00000002-x")
    assert shards(second) == {"000001.jsonl": "one", "000002.jsonl": "two", "000003.jsonl": "three"}


def test_publishing_again_replaces_the_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(monkeypatch)
    arrive("two")
    branch = workspaces.publish("snapshot")
    arrive("three")
    assert workspaces.publish("promote") == branch
    assert git("log", "-1", "--format=%s", f"{branch}", folder=checkout) == "promote"
    assert git("rev-list", "--count", f"HEAD..{branch}", folder=checkout) == "1"
    assert git("status", "--porcelain", "--untracked-files=no") == ""
    assert folder.is_dir()


def test_half_a_folder_of_shards_does_not_pass_for_the_whole(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive("two")
    shutil.rmtree("data/raw")
    two = next(path for path in Path(".dvc/cache").rglob("*") if path.is_file() and path.read_text() == "two")
    two.unlink()
    folder = make(monkeypatch)
    # The snapshot then fetches all of it from the remote, or fails.
    assert not (folder / "data/raw").exists()


def test_outside_a_workspace_nothing_is_published_or_removed(checkout: Path) -> None:
    assert workspaces.publish("here") is None
    workspaces.remove()
    assert Path.cwd() == checkout
    assert (checkout / "dvc.lock").is_file()


def test_a_folder_without_a_commit_is_an_error(in_tmp: Path) -> None:
    with pytest.raises(StageError, match="works in a clone, which needs a git repository with a commit; run"):
        workspaces.commit_edits()


def test_twenty_runs_and_edits_every_moment_lose_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "nightshift.pipeline.workspaces"]
    runs = [
        subprocess.Popen([*command, f"{number:08}-x"], stdout=subprocess.PIPE, text=True, env=os.environ)
        for number in range(20)
    ]
    edits = 0
    while any(run.poll() is None for run in runs):
        edits += 1
        Path("params.yaml").write_text(f"sft: {{seed: {edits}}}\n")
        time.sleep(0.05)
    assert Path("params.yaml").read_text() == f"sft: {{seed: {edits}}}\n"
    seeds = set()
    for run in runs:
        assert run.stdout
        folder = Path(run.stdout.read().strip())
        assert git("status", "--porcelain", "--untracked-files=no", folder=folder) == ""
        seeds.add(git("show", "HEAD:params.yaml", folder=folder))
        assert shards(folder) == {"000001.jsonl": "one"}
    assert len(seeds) > 1


def test_the_next_run_continues_from_the_newest_branch_wherever_the_clock_is(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for number, (text, clock) in enumerate((("two", now), ("three", now - 86_400)), start=1):
        make(monkeypatch, f"0000000{number}-x")
        arrive(text)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda clock=clock: clock)
            workspaces.publish("night")
        workspaces.remove()
    # A branch of the user's with such a name has no dvc.lock.
    git("branch", "runs/mine")
    assert len(shards(make(monkeypatch, "00000003-x"))) == 3
    assert checkout.is_dir()
