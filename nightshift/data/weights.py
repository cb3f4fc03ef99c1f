"""Repeat examples as often as the weight of their source says."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from nightshift.core.files import text_digest

# Columns that `Weights.apply` reads.
COLUMNS = ("source", "group_id", "ordinal")


@dataclass(slots=True)
class Weights:
    """Times that each example of a source is trained per epoch.

    Attributes:
        of: Source -> weight; 1 for all others.
        left_out: Examples that are not trained, by source.
        added: Additional copies of examples, by source.
    """

    of: Mapping[str, float]
    left_out: Counter[str] = field(default_factory=Counter)
    added: Counter[str] = field(default_factory=Counter)

    def apply(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield batches with each example repeated or left out; the copies of an example are adjacent.

        Args:
            batches: Batches with the columns `COLUMNS`.
        """
        for batch in batches:
            rows = list(zip(*(batch[name].to_pylist() for name in COLUMNS), strict=True))
            counts = [copies(self.of.get(row[0], 1.0), f"{row[1]}/{row[2] or 0}") for row in rows]
            for row, count in zip(rows, counts, strict=True):
                self.left_out[row[0]] += count == 0
                self.added[row[0]] += max(count - 1, 0)
            yield batch.take(pa.array([i for i, n in enumerate(counts) for _ in range(n)], pa.int64()))


def copies(weight: float, key: str) -> int:
    """Return how often an example is trained: the whole part of the weight, plus one by the hash of a key.

    The key has to be a content that stays equal when a source is exported again, so that each night trains
    the same examples. A higher weight keeps the examples of a lower one.

    Example:
        >>> copies(2.0, "a"), sum(copies(1.5, str(i)) for i in range(1000)), copies(0.5, "3")
        (2, 1508, 1)
    """
    whole = int(weight)
    return whole + (int(text_digest(key), 16) / 2**64 < weight - whole)
