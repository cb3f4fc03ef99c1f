"""Sample paraphrases: a few accepted ones, and a few rejected ones per reason."""

from collections import Counter
from collections.abc import Iterable
from heapq import nsmallest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.core.files import iterate_rows

# Number of accepted paraphrases; of rejected ones per reason, and in total.
ACCEPTED, PER_REASON, REJECTED = 5, 2, 8


def accepted_paraphrases(train: Path, scores: Path) -> list[dict[str, Any]]:
    """Return some accepted paraphrases with their sources and scores.

    Ids are digests, so the smallest ids are a reproducible random sample.
    """
    kinds = pq.read_table(train, columns=["id", "parent_id"])
    ids = kinds.filter(pc.is_valid(kinds["parent_id"]))["id"].to_pylist()
    found = read_examples(train, nsmallest(ACCEPTED, ids))
    sources = read_examples(train, [row["parent_id"] for row in found.values()])
    measured = {row["id"]: row for row in iterate_rows(scores) if row["id"] in found}
    return [
        {**row, **measured.get(row["id"], {}), "parent": sources.get(row["parent_id"])}
        for row in found.values()
    ]


def rejected_paraphrases(train: Path, rejected: Path) -> list[dict[str, Any]]:
    """Return the first rejected candidates of each reason, with their sources."""
    seen: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    for row in iterate_rows(rejected):
        seen[row["reason"]] += 1
        if seen[row["reason"]] <= PER_REASON and len(found) < REJECTED:
            found.append(row)
    sources = read_examples(train, [row["parent_id"] for row in found])
    return [{**row, "parent": sources.get(row["parent_id"])} for row in found]


def read_examples(path: Path, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return id -> example for the ids in a file, ordered by id; only these are kept in memory."""
    # An empty list would have no type to compare ids with.
    wanted = pa.array(list(ids), pa.string())
    rows = pq.read_table(path, filters=pc.field("id").isin(wanted)).to_pylist()
    return {row["id"]: row for row in sorted(rows, key=lambda row: row["id"])}
