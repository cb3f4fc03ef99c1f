"""Comparisons of answers: those whose rejected answer or prompt overlaps with an evaluation question go."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from nightshift.core.files import iterate_batches

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SEARCHED = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("origin", pa.string()),
        ("parent_id", pa.string()),
        ("messages", TURNS),
    ]
)


def batches_of_rejected(path: Path, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield each prompt of the training split with its rejected answer, as training rows to search.

    The chosen answer is that of an example, which is searched as such. A comparison has the passages of its
    prompt in common with that example: like a paraphrase, it does not make them common.

    Args:
        path: Comparisons with their sides.
        rows: Rows of a batch.
    """
    for batch in iterate_batches(path, rows=rows):
        found = [
            {
                "id": row["id"],
                "source": row["source"],
                "origin": row["origin"],
                "parent_id": row["id"],
                "messages": [*row["prompt"], *row["rejected"]],
            }
            for row in batch.to_pylist()
            if row["side"] == "train" and row["rejected"]
        ]
        yield pa.RecordBatch.from_pylist(found, schema=SEARCHED)


class Comparisons:
    """Which comparisons preference tuning uses.

    Attributes:
        counts: Comparisons by split, or by the reason why they are left out.
    """

    def __init__(self, trained: Container[str], hits: Container[str]) -> None:
        """Prepare the selection.

        Args:
            trained: Ids of the clean training rows.
            hits: Ids of comparisons that overlap with an evaluation question.
        """
        self.counts = Counter[str]()
        self._trained, self._hits = trained, hits

    def summary(self) -> dict[str, Any]:
        """Return the counts for the summary; nothing if there are no comparisons."""
        return {"compared": dict(sorted(self.counts.items()))} if self.counts else {}

    def select(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the clean rows of the training split, and those of the validation split.

        A comparison in the test split is never used: its example measures the model.
        """
        for row in rows:
            side = row["side"]
            example = row["example_id"]
            if side == "train" and (
                row["id"] in self._hits or (example is not None and example not in self._trained)
            ):
                side = "overlap"
            self.counts[side] += 1
            if side in ("train", "validation"):
                yield row
