"""Changes since the champion, from the lineage of both versions."""

from pathlib import Path
from typing import Any

import yaml

from nightshift.core.files import iterate_rows, read_json

Table = list[tuple[str, str, str]]


def find_changes(before: Path, after: Path) -> dict[str, Any]:
    """Compare two lineages (`nightshift.registry.lineage`).

    Args:
        before: Folder of the champion's lineage.
        after: Folder of the candidate's lineage.

    Returns:
        made: (what, before, after) for code, base, Python and libraries that differ; params: the same
        for parameters; rows: source -> added, removed, kept; new_shards and gone_shards.
    """
    old, new = read_json(before / "lineage.json"), read_json(after / "lineage.json")
    # A shard never changes; the same name in another history is a different shard.
    shards = [{(one["shard"], one["sha256"]): one for one in lineage["shards"]} for lineage in (old, new)]
    return {
        "made": differences(_made_of(old), _made_of(new)),
        "params": differences(
            *(flatten(yaml.safe_load((one / "params.yaml").read_text())) for one in (before, after))
        ),
        "rows": count_rows(_rows(before), _rows(after)),
        "new_shards": [shard for name, shard in shards[1].items() if name not in shards[0]],
        "gone_shards": [shard for name, shard in shards[0].items() if name not in shards[1]],
    }


def differences(before: dict[str, str], after: dict[str, str]) -> Table:
    """List the keys whose values differ; a missing value is "none".

    Example:
        >>> differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
        [('b', '2', '3'), ('c', 'none', '4')]
    """
    keys = sorted(before.keys() | after.keys())
    pairs = [(key, before.get(key, "none"), after.get(key, "none")) for key in keys]
    return [row for row in pairs if row[1] != row[2]]


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested sections to `section.key` -> value.

    Example:
        >>> flatten({"sft": {"seed": 0, "kwargs": {}}})
        {'sft.seed': '0', 'sft.kwargs': '{}'}
    """
    if isinstance(values, dict) and values:
        return {
            name: text
            for key, value in values.items()
            for name, text in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: "null" if values is None else str(values)}


def count_rows(before: dict[str, str], after: dict[str, str]) -> dict[str, dict[str, int]]:
    """Count the training examples that were added, removed and kept, by source.

    Args:
        before: id -> source of the champion's examples.
        after: id -> source of the candidate's examples.

    Example:
        >>> count_rows({"a": "facts", "b": "chats"}, {"a": "facts", "c": "facts"})
        {'chats': {'added': 0, 'removed': 1, 'kept': 0}, 'facts': {'added': 1, 'removed': 0, 'kept': 1}}
    """
    counts = {
        source: dict.fromkeys(("added", "removed", "kept"), 0)
        for source in sorted({*before.values(), *after.values()})
    }
    for one, source in (before | after).items():
        came, went = one not in before, one not in after
        counts[source]["added" if came else "removed" if went else "kept"] += 1
    return counts


def _rows(folder: Path) -> dict[str, str]:
    """Return id -> source of the training examples."""
    return {row["id"]: row["origin"].partition("/")[0] for row in iterate_rows(folder / "rows.parquet")}


def _made_of(lineage: dict[str, Any]) -> dict[str, str]:
    """Return the code, base and environment of a version as a flat dictionary."""
    base, environment = lineage["base"], lineage["environment"]
    files = {f"base file {name}": digest[:12] for name, digest in base["files"].items()}
    return {
        "code": lineage["code"][:12],
        "base": base["model"],
        "base precision": base["dtype"],
        **files,
        **environment,
    }
