"""Damaged objects in DVC's cache and remote are found before they are used, named, and fetched again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nightshift.core.files import read_json
from nightshift.pipeline import dvc_cache, workspaces
from nightshift.pipeline.graph import locked_outputs
from nightshift.pipeline.workspaces import git
from tests.helpers.checkouts import BIN, run_flow

COUNT = 1000
MAKE = f"""
from pathlib import Path
Path("data/raw").mkdir(parents=True)
for number in range({COUNT}):
    Path(f"data/raw/{{number}}.jsonl").write_text(f"row {{number}}")
Path("data/model").write_text("weights")
"""
GRAPH = """
stages:
  snapshot: {cmd: python make.py, outs: [data/raw, data/model]}
"""


@pytest.fixture
def checkout(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a checkout with 1000 files and a model, in the cache and in a remote that verifies."""
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(in_tmp / ".nightshift"))
    Path("make.py").write_text(MAKE)
    Path("dvc.yaml").write_text(GRAPH)
    Path("params.yaml").write_text("")
    Path(".gitignore").write_text("/data/\n/.nightshift/\n")
    git("init", "-q")
    dvc("init")
    dvc("remote", "add", "--default", "store", str(in_tmp / "remote"))
    dvc("remote", "modify", "store", "verify", "true")
    git("add", "-A")
    git("-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qm", "first")
    dvc("repro")
    dvc("push")
    return in_tmp


def dvc(command: str, *arguments: str) -> None:
    subprocess.run(["dvc", command, "-q", *arguments], check=True)


def objects(store: Path) -> list[Path]:
    """Return the objects of the files of data/raw."""
    found = [path for path in (store / "files/md5").rglob("*") if path.is_file() and path.suffix != ".dir"]
    return [path for path in found if path.read_text().startswith("row")]


def flip(path: Path) -> None:
    """Flip a bit of a file in place; its size, rights and times stay as they were."""
    before = path.stat()
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rows(folder: Path) -> set[str]:
    return {path.read_text() for path in (folder / "data/raw").iterdir()}


EXPECTED = {f"row {number}" for number in range(COUNT)}


def test_a_thousand_flipped_objects_of_the_cache_are_named_and_fetched_again(checkout: Path) -> None:
    for path in objects(Path(".dvc/cache")):
        flip(path)
    found = dvc_cache.mend(checkout)
    assert len(found) == COUNT
    named = {line.partition(":")[0] for line in found if line.endswith("which was fetched again")}
    assert named == {f"data/raw/{number}.jsonl" for number in range(COUNT)}
    assert dvc_cache.mend(checkout) == []
    shutil.rmtree("data")
    dvc("checkout")
    assert rows(checkout) == EXPECTED


def test_a_thousand_objects_flipped_in_cache_and_remote_are_not_used(checkout: Path) -> None:
    for store in (Path(".dvc/cache"), Path("remote")):
        for path in objects(store):
            flip(path)
    for path in (checkout / "data/raw").iterdir():
        path.chmod(0o644)
        path.write_text("changed")
    found = dvc_cache.mend(checkout)
    assert len(found) == COUNT
    assert all("and no remote has it; it is in " in line for line in found)
    assert objects(Path(".dvc/cache")) == []
    assert len(list((checkout / ".nightshift/damaged").iterdir())) == COUNT


def test_what_no_remote_has_is_taken_from_the_folder_if_it_is_whole_there(checkout: Path) -> None:
    shutil.rmtree("remote")
    flipped = objects(Path(".dvc/cache"))[0]
    whole = flipped.read_bytes()
    flip(flipped)
    (line,) = dvc_cache.mend(checkout)
    assert line.endswith("which was fetched again")
    assert flipped.read_bytes() == whole


def test_a_damaged_listing_of_a_folder_is_fetched_again_and_its_files_are_checked(checkout: Path) -> None:
    oid = locked_outputs()["snapshot"]["data/raw"]
    listing = Path(".dvc/cache/files/md5", oid[:2], oid[2:])
    entry = read_json(listing)[0]["md5"]
    flip(listing)
    flip(Path(".dvc/cache/files/md5", entry[:2], entry[2:]))
    first, second = dvc_cache.mend(checkout)
    assert {first.split()[-1], second.split()[-1]} == {"again"}
    assert len(read_json(listing)) == COUNT


def test_a_workspace_never_has_what_was_damaged(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(objects(Path(".dvc/cache"))[0])
    folder = checkout / ".nightshift/workspaces/2026-01-31-00000001"
    workspaces.create(folder)
    monkeypatch.chdir(folder)
    assert rows(folder) == EXPECTED
    (note,) = workspaces.read_notes()
    assert note.endswith("which was fetched again")


def test_without_a_remote_the_stage_runs_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("remote")
    shutil.rmtree("data/raw")
    flip(objects(Path(".dvc/cache"))[0])
    folder = checkout / ".nightshift/workspaces/2026-01-31-00000001"
    workspaces.create(folder)
    monkeypatch.chdir(folder)
    assert not Path("data/raw").exists()
    dvc("repro")
    assert rows(folder) == EXPECTED


FLOW = """
from pathlib import Path
from prefect import flow
from prefect.testing.utilities import prefect_test_harness
from flows.stages import run_stage
from tests.integration.test_cache import flip

@flow
def nights():
    for text in ("one", "two", "one"):
        Path("input").write_text(text)
        if text == "one":
            for path in Path(".dvc/cache/files/md5").rglob("*"):
                if path.is_file() and path.read_bytes() == b"one":
                    flip(path)
        yield run_stage("copy", None, return_state=True).name
    yield Path("data/copy").read_text()

with prefect_test_harness():
    print(*nights())
"""


def test_a_restored_result_that_is_damaged_is_computed_again(
    in_tmp: Path, clean_environment: dict[str, str]
) -> None:
    Path("dvc.yaml").write_text(
        "stages: {copy: {cmd: mkdir -p data && cp input data/copy, deps: [input], outs: [data/copy]}}"
    )
    lines = run_flow(in_tmp, FLOW, clean_environment)
    # A program that reports no result counts as one that DVC did not run.
    assert "Cached Cached Cached one" in lines
    assert any("and no remote has it; it is in " in line and "restoring copy again" in line for line in lines)
