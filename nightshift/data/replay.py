"""Train a share of the older examples again, against forgetting, when a version is trained further."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from nightshift.core.files import hash_share

Row = Mapping[str, Any]


@dataclass(slots=True)
class Replay:
    """Which examples are trained: all new ones, and a share of those that the start was trained on.

    Attributes:
        share: Share of the older examples, 0 to 1.
        seed: Seed of their choice.
        trained: Ids of the examples that the start was trained on, also through the version it started from.
        replayed: Older examples that are trained again, by source.
        left_out: Older examples that are not, by source.
    """

    share: float = 1.0
    seed: int = 0
    trained: Set[str] = frozenset()
    replayed: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def draw(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """Yield the (row number, row) that are trained; a new paraphrase of an older example is not new.

        Args:
            rows: Row numbers, and examples with id, parent_id and source.
        """
        for number, row in rows:
            if row["id"] in self.trained or row["parent_id"] in self.trained:
                is_chosen = is_replayed(row["id"], self.share, self.seed)
                (self.replayed if is_chosen else self.left_out)[row["source"]] += 1
                if not is_chosen:
                    continue
            yield number, row


def is_replayed(example_id: str, share: float, seed: int) -> bool:
    """Return whether an older example is trained again, by the hash of its id.

    Each example is chosen on its own, so the choice depends neither on their order nor on what arrives later,
    and a higher share keeps the examples of a lower one. How many of n examples are chosen is binomial: the
    standard deviation is at most half the root of n.

    Example:
        >>> sum(is_replayed(str(i), 0.25, seed=0) for i in range(1000)), is_replayed("a", 1.0, seed=0)
        (260, True)
    """
    return hash_share(f"replay {seed} {example_id}") < share
