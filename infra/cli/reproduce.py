"""Rebuild a version of the model from its lineage, and compare the outputs."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nightshift.core.config import PARAMS
from nightshift.core.errors import GateError, StageError
from nightshift.core.files import read_json, tree_digest
from nightshift.core.stage import print_line
from nightshift.core.state import state_dir, tools_environment
from nightshift.core.trained import trained_model
from nightshift.pipeline import supervise
from nightshift.pipeline.graph import locked_outputs, stage_order
from nightshift.pipeline.params_yaml import edit
from nightshift.pipeline.workspaces import clone, share_dvc
from nightshift.registry.lineage import KEPT, open_lineage
from nightshift.registry.versions import DIGEST, FORGOTTEN, find_version, open_registry

FETCHED = ("data/raw", "data/benchmarks", "data/start")
# A run id and a throughput; and settings with what was requested, which `pin_processes` changes. Those in
# effect are compared one by one.
VARYING = ("data/sft/mlflow_run.json", "data/sft/effective.json", "data/prefer/record")


def rebuild(console: Console, version: int) -> bool:
    """Run the pipeline up to training in a fresh workspace; return whether the adapter is bit-identical.

    Nothing is restored: DVC's run cache is off, and the workspace has separate state. Only the outputs
    of the snapshot come from DVC's cache or its remote, because a new snapshot would fetch today's data.

    Raises:
        GateError: The version does not exist, some of its rows were forgotten, or it was registered before
            the snapshot was a stage.
        StageError: Its commit is not in this repository, a stage failed, or the data is gone.
    """
    client, name = open_registry()
    found = find_version(client, name, version)
    if FORGOTTEN in found.tags:
        raise GateError(
            f"registry: {found.tags[FORGOTTEN]} examples of version {version} were forgotten, so its "
            "training data no longer exists; train a new version"
        )
    folder = state_dir() / "reproduce" / f"{name}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    with open_lineage(name, version) as lineage:
        lineage_data = read_json(lineage / "lineage.json")
        require_known_origin(version, lineage_data, before := locked_outputs(lineage / "dvc.lock"))
        clone(folder, lineage_data["code"])
        for path in KEPT:
            shutil.copyfile(lineage / path.name, folder / path)
    # The lineage of a 0.1.0 version has no effective settings.
    trained = lineage_data.get("effective", {})
    pin_processes(folder / PARAMS, trained)
    fetch_data(folder, [path for path in FETCHED if path in before["snapshot"]])
    stages = stages_to_rebuild(folder)
    options = ("--force", "--no-run-cache", "--single-item")
    require(dvc(folder, "repro", *options, *stages), f"a stage failed in {folder}")
    after = locked_outputs(folder / "dvc.lock")
    compared = [(stage, path) for stage in stages for path in after[stage] if path not in VARYING]
    different = [path for stage, path in compared if after[stage][path] != before.get(stage, {}).get(path)]
    adapter = tree_digest(trained_model(folder))
    is_same = bool(adapter == found.tags[DIGEST])
    rows = {
        "registered adapter": found.tags[DIGEST],
        "rebuilt adapter": adapter,
        "verdict": "bit-identical" if is_same else "different",
        "different settings": ", ".join(differences(trained, folder)) or "none",
        "outputs that differ": ", ".join(sorted(different)) or f"none of {len(compared)}",
    }
    table = Table(title=f"Version {version} of {name}, rebuilt in {folder}", box=None, show_header=False)
    for label, value in rows.items():
        table.add_row(label, value)
    console.print(table)
    return is_same


def require_known_origin(version: int, lineage: dict[str, Any], outputs: dict[str, dict[str, str]]) -> None:
    """Require a lineage that says how the version was made.

    Raises:
        GateError: The version was adopted, or registered before the snapshot was a stage.
    """
    if "adopted" in lineage:
        raise GateError(
            f"registry: version {version} was adopted from {lineage['adopted']['from']}; its data and code "
            "are not known, so it cannot be reproduced"
        )
    if "snapshot" not in outputs:
        commit = lineage["code"]
        raise GateError(
            f"registry: version {version} was registered before the snapshot became a stage; "
            f"run `git checkout {commit}`, then `nightshift reproduce {version}`"
        )


def pin_processes(params: Path, trained: dict[str, Any]) -> None:
    """Set the number of processes that trained the version; `auto` may give another number here."""
    if trained:
        number = {"sft.num_processes": trained["num_processes"]["effective"]}
        params.write_text(edit(params.read_text(encoding="utf-8"), number), encoding="utf-8")


def differences(trained: dict[str, Any], folder: Path) -> list[str]:
    """List the effective settings that differ from those of the machine that trained the version."""
    found = read_json(folder / "data" / "sft" / "effective.json")
    settings = {key: row for key, row in trained.items() if isinstance(row, dict) and "effective" in row}
    return [
        f"{key} {found[key]['effective']} instead of {row['effective']}"
        for key, row in settings.items()
        if key != "devices" and found[key]["effective"] != row["effective"]
    ]


def fetch_data(folder: Path, paths: Sequence[str]) -> None:
    """Fetch outputs in the workspace's dvc.lock from DVC's cache or its remote.

    Raises:
        StageError: Neither contains the data.
    """
    share_dvc(folder)
    if dvc(folder, "checkout", "--quiet", *paths):
        wanted = ", ".join(paths)
        require(dvc(folder, "pull", *paths), f"{wanted}: neither in DVC's cache nor in its remote")


def stages_to_rebuild(folder: Path) -> list[str]:
    """Return the stages up to the training, in order, without the snapshot."""
    order = stage_order(folder / "dvc.yaml")
    # A version of an earlier release has no preference tuning.
    last = "prefer" if "prefer" in order else "sft"
    return [stage for stage in order[: order.index(last) + 1] if stage != "snapshot"]


def dvc(folder: Path, *arguments: str) -> int:
    """Run DVC in a workspace with separate state, and return its exit code."""
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
        StageError: The command failed.
    """
    if code:
        raise StageError(f"{problem} (exit code {code}); see the output above")
