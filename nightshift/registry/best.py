"""The scores of the best champion so far, which every later version carries on in its lineage.

A version's lineage has its own scores, and those of the best champion before it. So the champion's lineage
is enough to find the best of both: nothing depends on versions that were deleted, and after a rollback the
versions that were rolled back no longer count.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from nightshift.core.files import read_json, read_rows, write_rows
from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import SCORES, Score
from nightshift.registry.lineage import open_lineage

Scores = list[Score]


def fetch_best(champion: ModelVersion, target: Path) -> dict[str, Any]:
    """Write the best scores so far to a Parquet file, and return what is known about them.

    Returns:
        arrival: Number of the newest shard in the champion's data; None if it was trained elsewhere.
        best: Benchmark -> version that has these scores, and digest of the benchmark's task.

    Raises:
        GateError: The champion has no lineage.
    """
    with open_lineage(champion.name, int(champion.version), "lineage.json") as file:
        known = read_json(file)
    found: dict[str, tuple[Scores, dict[str, Any]]] = {}
    # A version that was trained elsewhere, or by an earlier release, has no scores.
    if "tasks" in known:
        with open_lineage(champion.name, int(champion.version), "scores.parquet") as file:
            found = merge(read_rows(file), int(champion.version), known)
    write_rows(target, (row for rows, _ in found.values() for row in rows), SCORES)
    numbers = [int(Path(one["shard"]).name.partition(".")[0]) for one in known.get("shards", ())]
    return {"arrival": max(numbers, default=None), "best": {name: one for name, (_, one) in found.items()}}


def merge(
    rows: Sequence[Score], version: int, known: Mapping[str, Any]
) -> dict[str, tuple[Scores, dict[str, Any]]]:
    """Choose the better scores of each benchmark: the version's own, or the best before it.

    Args:
        rows: Score table of the night on which the version was the candidate.
        version: The version.
        known: Its lineage.json.

    Returns:
        Benchmark -> scores, and their version with the digest of the task.
    """
    tasks, before = known.get("tasks", {}), known.get("best", {})
    found: dict[str, tuple[Scores, dict[str, Any]]] = {}
    for name in sorted({row["benchmark"] for row in rows if row["model"] == "candidate"}):
        own = {row["item"]: row for row in scored(rows, name, "candidate")}
        best = {row["item"]: row for row in scored(rows, name, "best")}
        common = own.keys() & best.keys()
        lead = sum(own[item]["score"] - best[item]["score"] for item in common)
        is_better = (lead > 0 if name == HELDOUT else lead < 0) and name in before
        chosen, about = (best, before.get(name)) if is_better else (own, None)
        found[name] = (list(chosen.values()), about or {"version": version, "task": tasks.get(name)})
    return found


def scored(rows: Sequence[Score], benchmark: str, model: str) -> Iterator[Score]:
    """Yield the scores of a model on a benchmark, without items that it could not answer."""
    for row in rows:
        if (row["model"], row["benchmark"], row["status"]) == (model, benchmark, "ok"):
            yield row
