"""How the candidates of the last nights answered each benchmark item."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score

Kind = Literal["never right", "always right", "unstable", ""]
# Score from which an answer is right.
RIGHT = 0.5
# Nights from which an item has a kind, and share of nights that changed the answer to an unstable one.
FEWEST, UNSTABLE = 3, 1 / 3


@dataclass(frozen=True, slots=True)
class History:
    """The scores of one item.

    Attributes:
        benchmark: Name of the benchmark.
        item: Id of the item.
        question: Question.
        expected: Reference answer, or None.
        scores: Scores of the candidates, oldest first.
    """

    benchmark: str
    item: str
    question: str
    expected: str | None
    scores: list[float]

    @property
    def kind(self) -> Kind:
        """What the scores say about the item; empty if it is as it should be, or there are too few nights.

        Example:
            >>> [History("facts", "1", "?", "!", scores).kind for scores in ([0, 0, 0], [1, 0, 1], [1, 1])]
            ['never right', 'unstable', '']
        """
        right = [score >= RIGHT for score in self.scores]
        if len(right) < FEWEST:
            return ""
        if not any(right):
            return "never right"
        if all(right):
            return "always right"
        changes = sum(before != after for before, after in pairwise(right))
        # One change is an item that was learned, or forgotten.
        return "unstable" if changes > max(1, UNSTABLE * (len(right) - 1)) else ""


def find_histories(nights: Iterable[Sequence[Score]]) -> dict[str, list[History]]:
    """Collect the scores of each item that the last candidate was asked, by benchmark.

    An item whose question or reference answer changed starts anew.

    Args:
        nights: Score table of each night, oldest first.
    """
    found: dict[tuple[str, str, str, str | None], History] = {}
    last: set[tuple[str, str, str, str | None]] = set()
    for rows in nights:
        last = set()
        for row in rows:
            if row["model"] != "candidate" or row["status"] != "ok" or row["benchmark"] == HELDOUT:
                continue
            key = (row["benchmark"], row["item"], row["question"], row["expected"])
            found.setdefault(key, History(*key, [])).scores.append(row["score"])
            last.add(key)
    by_benchmark: dict[str, list[History]] = defaultdict(list)
    for key in sorted(last, key=lambda one: one[:2]):
        by_benchmark[key[0]].append(found[key])
    return dict(by_benchmark)
