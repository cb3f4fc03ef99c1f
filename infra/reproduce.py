"""Rebuild a version of the model from what its lineage names, and compare what came out."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tasks import supervise
from tasks.errors import GateError, StageError
from tasks.files import read_json, tree_digest
from tasks.lineage import KEPT, open_lineage
from tasks.registry import DIGEST, FORGOTTEN, find_version, open_registry
from tasks.stage import print_line
from tasks.state import state_dir, tools_environment

MODEL = Path("data/sft/model")


def rebuild(console: Console, version: int) -> bool:
    """Run the graph as far as the training in a fresh workspace, and tell whether the adapter is the same.

    Nothing is restored: DVC's run cache is off, and the state of the workspace is its own. Only the raw data
    and the benchmarks come from DVC's cache, or its remote.

    Raises:
        GateError: There is no such version, some of its rows were forgotten, or its code is not in this
            repository.
        StageError: A stage failed, or the data is gone.
    """
    client, name = open_registry()
    found = find_version(client, name, version)
    if FORGOTTEN in found.tags:
        raise GateError(
            f"registry: {found.tags[FORGOTTEN]} examples of version {version} were forgotten since; "
            "its data is gone for good: train a new version"
        )
    folder = state_dir() / "reproduce" / f"{name}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    with open_lineage(name, version) as lineage:
        make_workspace(folder, str(read_json(lineage / "lineage.json")["code"]))
        (folder / "data").mkdir()
        for path in KEPT:
            shutil.copyfile(lineage / path.name, folder / path)
        before = outputs(lineage / "dvc.lock")
    cache = str(Path(".dvc/cache").absolute())
    require(dvc(folder, "config", "--local", "cache.dir", cache), f"{folder} is no DVC repository")
    data = ("data/raw.dvc", "data/benchmarks.dvc")
    if dvc(folder, "checkout", "--quiet", *data):
        require(dvc(folder, "pull", *data), f"{', '.join(data)}: neither in DVC's cache nor in its remote")
    require(dvc(folder, "repro", "--force", "--no-run-cache", "sft"), f"a stage failed in {folder}")
    after = outputs(folder / "dvc.lock")
    different = sorted(path for path, digest in after.items() if path in before and before[path] != digest)
    adapter = tree_digest(folder / MODEL)
    is_same = bool(adapter == found.tags[DIGEST])
    table = Table(title=f"Version {version} of {name}, rebuilt in {folder}", box=None, show_header=False)
    table.add_row("registered adapter", found.tags[DIGEST])
    table.add_row("rebuilt adapter", adapter)
    table.add_row("verdict", "the same, bit for bit" if is_same else "different")
    table.add_row("outputs that differ", ", ".join(different) or f"none of {len(after)}")
    console.print(table)
    return is_same


def make_workspace(folder: Path, commit: str) -> None:
    """Clone this repository at a commit.

    Raises:
        GateError: The commit is not there.
    """
    for command in (
        ["clone", "--quiet", "--no-checkout", ".", str(folder)],
        ["-C", str(folder), "checkout", "-q", commit],
    ):
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise GateError(
                f"git {command[0]}: {done.stderr.strip()}; the version was trained on commit {commit}"
            )


def outputs(lock: Path) -> dict[str, str]:
    """Return path -> digest of all that the stages of a dvc.lock wrote, as far as the training."""
    stages: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    # A run id and a speed stand in it.
    ignored = "data/sft/mlflow_run.json"
    outs = (
        out
        for name, stage in stages.items()
        if name not in ("evaluate", "gate")
        for out in stage.get("outs", ())
    )
    return {out["path"]: out["md5"] for out in outs if out["path"] != ignored}


def dvc(folder: Path, *arguments: str) -> int:
    """Run DVC in a workspace whose state is its own, and return its exit code."""
    environment = {
        "NIGHTSHIFT_HOME": str(folder / ".nightshift"),
        "MLFLOW_TRACKING_URI": "",
        "MLFLOW_RUN_ID": "",
        **tools_environment(),
    }
    command = [sys.executable, "-m", "dvc", "--cd", str(folder), *arguments]
    return supervise.run(command, on_line=print_line, env=environment, grace_seconds=60.0)


def require(code: int, problem: str) -> None:
    """Check the exit code of a command.

    Raises:
        StageError: It failed.
    """
    if code:
        raise StageError(f"{problem} (exit code {code}); the reason stands above")
