"""Read dvc.yaml: the execution order of the stages, and which of them may have to run."""

import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nightshift.core.errors import ConfigError

GRAPH = Path("dvc.yaml")
LOCK = Path("dvc.lock")


def read_stages(path: Path = GRAPH) -> dict[str, dict[str, Any]]:
    """Return name -> definition of every stage.

    Raises:
        ConfigError: The file is missing or defines no stage.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found; run from the folder that contains it")
    stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages")
    if not stages:
        raise ConfigError(f"{path}: defines no stage; restore it from git")
    return dict(stages)


def stage_order(path: Path = GRAPH) -> list[str]:
    """Return the stages in topological order: each after the stages whose outputs it reads.

    Ties keep the order of the file, so the result is deterministic.

    Raises:
        ConfigError: The stages form a cycle.
    """
    stages = read_stages(path)
    needs = {name: {o for o in stages if reads(stages[name], stages[o])} for name in stages}
    sorter = graphlib.TopologicalSorter(needs)
    try:
        sorter.prepare()
    except graphlib.CycleError as err:
        raise ConfigError(f"{path}: stages form a cycle: {err.args[1]}; remove one dependency") from err
    order: list[str] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        first = next(name for name in stages if name in ready)
        ready.remove(first)
        order.append(first)
        sorter.done(first)
    return order


def find_unread(path: Path = GRAPH) -> list[str]:
    """Return the stages, except the gate, whose outputs no other stage reads: they have no effect."""
    stages = read_stages(path)
    return [
        name
        for name, stage in stages.items()
        if outputs(stage)
        and name != "gate"
        and not any(reads(other, stage) for key, other in stages.items() if key != name)
    ]


def outputs(stage: dict[str, Any]) -> list[str]:
    """Return the paths that a stage writes."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def reads(stage: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether a stage depends on an output of another, or on a path inside or above that output.

    Example:
        >>> reads({"deps": ["data/a/x.json"]}, {"outs": ["data/a"]})
        True
        >>> reads({"deps": ["data/ab"]}, {"outs": ["data/a"]})
        False
    """
    dependencies = [PurePosixPath(path) for path in stage.get("deps", [])]
    written = [PurePosixPath(path) for path in outputs(other)]
    return any(d.is_relative_to(w) or w.is_relative_to(d) for d in dependencies for w in written)


def locked_outputs(path: Path = LOCK) -> dict[str, dict[str, str]]:
    """Return stage -> output -> MD5 of the last run from dvc.lock; empty if the file does not exist."""
    return parse_outputs(path.read_text(encoding="utf-8")) if path.is_file() else {}


def parse_outputs(lock: str) -> dict[str, dict[str, str]]:
    """Return stage -> output -> MD5 from the text of a dvc.lock."""
    stages = (yaml.safe_load(lock) or {}).get("stages", {})
    return {
        name: {out["path"]: out["md5"] for out in stage.get("outs", ())} for name, stage in stages.items()
    }


def changed_stages() -> dict[str, str]:
    """Return stage -> changes, as reported by `dvc status`.

    Raises:
        ConfigError: `dvc status` failed.
    """
    return {name: ", ".join(how for _, how in entries) for name, entries in read_status().items()}


def changed_paths(stage: str) -> set[str]:
    """Return the paths, and other inputs, of one stage that changed since it last ran.

    Raises:
        ConfigError: `dvc status` failed.
    """
    return {what for what, _ in read_status(stage).get(stage, ())}


def read_status(*stages: str) -> dict[str, list[tuple[str, str]]]:
    """Return stage -> (what changed, how) of the stages, or of all.

    Raises:
        ConfigError: `dvc status` failed.
    """
    command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ConfigError(f"dvc status: {lines[-1]}; run `dvc status` for the full output")
    return {name: list(_changes(entries)) for name, entries in json.loads(done.stdout).items()}


def find_reruns(changed: Mapping[str, str]) -> dict[str, str]:
    """Return stage -> reason of all stages that will run, or may run if an upstream output changes."""
    stages, reasons = read_stages(), dict[str, str]()
    for name in stage_order():
        sources = [other for other in reasons if reads(stages[name], stages[other])]
        if name in changed:
            reasons[name] = changed[name]
        elif sources:
            reasons[name] = f"if the output of {', '.join(sources)} changes"
    return reasons


def _changes(entries: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Yield what changed in one stage, and how, of DVC's `{"changed deps": {path: how}}` or plain text."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry, entry
            continue
        for group in entry.values():
            for path, how in group.items():
                yield path, f"{path} {how}" if isinstance(how, str) else path
