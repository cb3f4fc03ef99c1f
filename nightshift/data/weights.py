"""Repeat examples as often as the weight of their source says."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nightshift.core.files import hash_share

Row = Mapping[str, Any]

# Columns that `Weights.repeat` reads.
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

    def repeat(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """Yield (row number, row), each row as often as it is trained; the copies of a row are adjacent.

        Args:
            rows: Row numbers, and examples with the columns `COLUMNS`.
        """
        for number, row in rows:
            source = row["source"]
            count = copies(self.of.get(source, 1.0), f"{row['group_id']}/{row['ordinal'] or 0}")
            self.left_out[source] += count == 0
            self.added[source] += max(count - 1, 0)
            for _ in range(count):
                yield number, row


def copies(weight: float, key: str) -> int:
    """Return how often an example is trained: the whole part of the weight, plus one by the hash of a key.

    The key has to be a content that stays equal when a source is exported again, so that each night trains
    the same examples. A higher weight keeps the examples of a lower one.

    Example:
        >>> copies(2.0, "a"), sum(copies(1.5, str(i)) for i in range(1000)), copies(0.5, "3")
        (2, 1508, 1)
    """
    whole = int(weight)
    return whole + (weight > whole and hash_share(key) < weight - whole)
