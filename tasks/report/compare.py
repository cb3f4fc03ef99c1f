"""Scores side by side: with an interval for each model, as differences, and item by item."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nightshift.core.files import text_digest
from nightshift.data.benchmarks import HELDOUT
from nightshift.data.statistics import estimate, estimate_difference
from tasks.gate import GateParams

# The order of the models in a group; others follow.
MODELS = ("base", "champion", "candidate")
# Slices of a benchmark, and items on each side, that the page shows; it says how many there are.
SLICES, ITEMS = 20, 10
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A mean with its interval.

    Attributes:
        label: A model, or `candidate - champion`.
        items: Of the mean.
        mean: Score of 0 to 1, or nats per token.
        low: Lower end of the interval; NaN where the bootstrap has none.
        high: Its upper end.
        unscored: Items left out, by their status.
        is_difference: Between the same items of two models.
    """

    label: str
    items: int
    mean: float
    low: float
    high: float
    unscored: dict[str, int]
    is_difference: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """The models on a benchmark, or on one slice of it.

    Attributes:
        name: The slice; empty for the whole benchmark.
        lines: Models, then the difference.
        chance: Mean score of a guess, 0 to 1; None where nobody can guess.
    """

    name: str
    lines: list[Line]
    chance: float | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, or the held-out examples.

    Attributes:
        name: As in params.yaml, or `test`.
        groups: The whole, then its slices.
        hidden: Slices that are left out.
    """

    name: str
    groups: list[Group]
    hidden: int

    @property
    def is_loss(self) -> bool:
        """Whether less is better."""
        return self.name == HELDOUT

    @property
    def scale(self) -> tuple[float, float]:
        """Ends of the axis of its scores: all that an answer can be worth, or all that the losses cover."""
        if not self.is_loss:
            return 0.0, 1.0
        found = _ends(line for group in self.groups for line in group.lines if not line.is_difference)
        return min(found, default=0.0), max(found, default=1.0)

    @property
    def reach(self) -> float:
        """End of the axis of its differences, which has zero in its middle."""
        found = _ends(line for group in self.groups for line in group.lines if line.is_difference)
        return max(map(abs, found), default=0.0) or 1.0


def compare(rows: Sequence[Row], reference: str, params: GateParams) -> list[Benchmark]:
    """Estimate every model on every benchmark and slice, and the candidate's difference from its reference.

    Args:
        rows: Scores of all models.
        reference: champion or base; on a benchmark of `gate.retention` it is the base, as in the gate.
        params: Error probability, resamples and seed of the intervals.
    """
    by_benchmark: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_benchmark[row["benchmark"]].append(row)
    # The held-out losses stand last.
    names = sorted(by_benchmark, key=lambda name: (name == HELDOUT, name))
    return [
        _benchmark(name, by_benchmark[name], "base" if name in params.retention else reference, params)
        for name in names
    ]


def _benchmark(name: str, rows: Sequence[Row], reference: str, params: GateParams) -> Benchmark:
    """Estimate the whole of a benchmark and its slices."""
    slices: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        slices[row["slice"]].append(row)
    # One slice is the whole; of many, the largest ones are shown.
    kept = sorted(slices, key=lambda one: (-len(slices[one]), one))[:SLICES] if len(slices) > 1 else []
    groups = [
        _group("", rows, reference, params),
        *(_group(one, slices[one], reference, params) for one in sorted(kept)),
    ]
    return Benchmark(name, groups, len(slices) - len(kept) if kept else 0)


def _group(name: str, rows: Sequence[Row], reference: str, params: GateParams) -> Group:
    """Estimate every model, and the candidate's difference, on the same rows."""
    models = {row["model"] for row in rows}
    order = [*(one for one in MODELS if one in models), *sorted(models.difference(MODELS))]
    lines = []
    for model in order:
        its = [row for row in rows if row["model"] == model]
        scored = [row for row in its if row["status"] == "ok"]
        unscored = dict(Counter(row["status"] for row in its if row["status"] != "ok"))
        if scored:
            lines.append(Line(model, len(scored), *estimate(scored, params), unscored))
        else:
            lines.append(Line(model, 0, np.nan, np.nan, np.nan, unscored))
    if pairs := pair(rows, reference):
        label = f"candidate \N{MINUS SIGN} {reference}"
        lines.append(Line(label, len(pairs), *estimate_difference(pairs, params), {}, is_difference=True))
    guesses = [1 / row["choices"] for row in rows if row["choices"]]
    return Group(name, lines, sum(guesses) / len(guesses) if guesses else None)


def pair(rows: Sequence[Row], reference: str) -> list[tuple[Row, Row]]:
    """Pair the candidate's scores with the reference's; an item without two scores is left out."""
    scored = {(row["model"], row["benchmark"], row["item"]): row for row in rows if row["status"] == "ok"}
    return [
        (row, scored[reference, benchmark, item])
        for (model, benchmark, item), row in sorted(scored.items())
        if model == "candidate" and (reference, benchmark, item) in scored
    ]


@dataclass(frozen=True, slots=True)
class Moves:
    """Items on which the candidate differs most from its reference, the largest first.

    Attributes:
        gains: Where it is better; at most `ITEMS`.
        regressions: Where it is worse; at most `ITEMS`.
        n_gains: All items where it is better.
        n_regressions: All items where it is worse.
        n_equal: Items where it is as good.
    """

    gains: list[dict[str, Any]]
    regressions: list[dict[str, Any]]
    n_gains: int
    n_regressions: int
    n_equal: int


def find_moves(pairs: Sequence[tuple[Row, Row]]) -> Moves:
    """Find the items with the largest differences; a held-out example counts by its loss per token.

    Among equal differences the digest of the item decides, so that no slice fills the list by its name.
    """
    moves = [
        {**ours, "before": theirs["answer"], "score_before": worth(theirs), "score_after": worth(ours)}
        for ours, theirs in pairs
    ]
    moves.sort(key=lambda move: (-abs(_gain(move)), text_digest(move["benchmark"], move["item"])))
    gains = [move for move in moves if _gain(move) > 0]
    regressions = [move for move in moves if _gain(move) < 0]
    equal = len(moves) - len(gains) - len(regressions)
    return Moves(gains[:ITEMS], regressions[:ITEMS], len(gains), len(regressions), equal)


def worth(row: Row) -> float:
    """Return what an answer is worth, or the loss per token of a held-out example.

    Example:
        >>> worth({"benchmark": "test", "score": 6.0, "tokens": 4})
        1.5
    """
    return float(row["score"] / row["tokens"] if row["benchmark"] == HELDOUT else row["score"])


def _gain(move: dict[str, Any]) -> float:
    """Return by how much the candidate is better; less loss is better."""
    difference = move["score_after"] - move["score_before"]
    return float(-difference if move["benchmark"] == HELDOUT else difference)


def _ends(lines: Iterable[Line]) -> list[float]:
    """Return all places that lines have on their axis."""
    return [end for line in lines for end in (line.mean, line.low, line.high) if np.isfinite(end)]
