"""Compare the scores: confidence interval per model, differences, and single items."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nightshift.core.files import text_digest
from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score
from nightshift.data.statistics import cluster, estimate, estimate_difference, p_value
from tasks.gate import GateParams

# Order of the models in a group; others follow.
MODELS = ("base", "best", "champion", "candidate")
# Slices per benchmark, and gains and regressions, that the page lists; it also shows the totals.
SLICES, ITEMS = 20, 10


@dataclass(frozen=True, slots=True)
class Line:
    """A mean with its confidence interval.

    Attributes:
        label: Model name, or `candidate - champion`.
        items: Number of items in the mean.
        mean: Mean score, 0 to 1, or loss in nats per token.
        low: Lower end of the interval; NaN if the bootstrap has none.
        high: Upper end of the interval.
        unscored: Status -> number of items left out.
        is_difference: Whether the mean is a difference of two models on the same items.
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
    """The models on a benchmark, or on one of its slices.

    Attributes:
        name: Name of the slice; empty for the whole benchmark.
        lines: Models, then the difference.
        chance: Chance level, 0 to 1; None if there are no choices.
    """

    name: str
    lines: list[Line]
    chance: float | None


@dataclass(frozen=True, slots=True)
class SliceChange:
    """Change of the candidate from its reference on a slice.

    Attributes:
        name: `benchmark/slice`, as in the gate.
        items: Number of items that both models answered.
        mean: Mean difference of their scores, -1 to 1.
    """

    name: str
    items: int
    mean: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, or the held-out examples.

    Attributes:
        name: Name in params.yaml, or `test`.
        groups: Whole benchmark, then its slices.
        hidden: Number of slices left out.
        changes: Every slice, also those left out; empty for a single slice or the held-out examples.
        p_value: Of the gate's test for the measured change, a gain or a loss, on the whole benchmark.
    """

    name: str
    groups: list[Group]
    hidden: int
    changes: list[SliceChange]
    p_value: float

    @property
    def is_loss(self) -> bool:
        """Whether lower is better."""
        return self.name == HELDOUT

    @property
    def change(self) -> Line | None:
        """Difference on the whole benchmark; None if no item has both scores."""
        return next((line for line in self.groups[0].lines if line.is_difference), None)

    @property
    def asked(self) -> int:
        """Number of items that the models were asked, with and without a score."""
        line = self.groups[0].lines[0]
        return line.items + sum(line.unscored.values())

    @property
    def gain(self) -> float:
        """Mean difference in favor of the candidate; 0 if no item has both scores."""
        mean = self.change.mean if self.change else 0.0
        return -mean if self.is_loss else mean

    def mean(self, model: str) -> float:
        """Return the mean score of a model on the whole benchmark; NaN without scores."""
        return next((line.mean for line in self.groups[0].lines if line.label == model), np.nan)

    @property
    def scale(self) -> tuple[float, float]:
        """Ends of the score axis: 0 to 1, or the range of the losses."""
        if not self.is_loss:
            return 0.0, 1.0
        found = _ends(line for group in self.groups for line in group.lines if not line.is_difference)
        return min(found, default=0.0), max(found, default=1.0)

    @property
    def reach(self) -> float:
        """Upper end of the difference axis, which is centred on zero."""
        found = _ends(line for group in self.groups for line in group.lines if line.is_difference)
        return max(map(abs, found), default=0.0) or 1.0


def compare(rows: Sequence[Score], reference: str, params: GateParams) -> list[Benchmark]:
    """Estimate every model on every benchmark and slice, and the candidate's gain over its reference.

    Args:
        rows: Scores of all models.
        reference: `champion` or `base`; a benchmark of `gate.retention` uses the base, as in the gate.
        params: Significance level, resamples and seed of the intervals.
    """
    by_benchmark: dict[str, list[Score]] = defaultdict(list)
    for row in rows:
        by_benchmark[row["benchmark"]].append(row)
    # Held-out losses come last.
    names = sorted(by_benchmark, key=lambda name: (name == HELDOUT, name))
    return [
        _benchmark(name, by_benchmark[name], "base" if name in params.retention else reference, params)
        for name in names
    ]


def _benchmark(name: str, rows: Sequence[Score], reference: str, params: GateParams) -> Benchmark:
    """Estimate a whole benchmark and its slices."""
    slices: dict[str, list[Score]] = defaultdict(list)
    for row in rows:
        slices[row["slice"]].append(row)
    # A single slice is the whole benchmark; of many, the largest are shown.
    kept = sorted(slices, key=lambda one: (-len(slices[one]), one))[:SLICES] if len(slices) > 1 else []
    groups = [
        _group("", rows, reference, params),
        *(_group(one, slices[one], reference, params) for one in sorted(kept)),
    ]
    pairs = pair(rows, reference)
    changes = change_by_slice(pairs) if len(slices) > 1 and name != HELDOUT else []
    sums = cluster(pairs).sums
    p = p_value(sums * np.sign(sums.sum()), params.n_resamples, params.seed, params.alpha)
    return Benchmark(name, groups, len(slices) - len(kept) if kept else 0, changes, p)


def _group(name: str, rows: Sequence[Score], reference: str, params: GateParams) -> Group:
    """Estimate every model, and the candidate's difference, on the same rows."""
    models = {row["model"] for row in rows}
    order = [*(one for one in MODELS if one in models), *sorted(models.difference(MODELS))]
    lines = []
    for model in order:
        of_model = [row for row in rows if row["model"] == model]
        scored = [row for row in of_model if row["status"] == "ok"]
        unscored = dict(Counter(row["status"] for row in of_model if row["status"] != "ok"))
        if scored:
            lines.append(Line(model, len(scored), *estimate(scored, params), unscored))
        else:
            lines.append(Line(model, 0, np.nan, np.nan, np.nan, unscored))
    if pairs := pair(rows, reference):
        label = f"candidate \N{MINUS SIGN} {reference}"
        lines.append(Line(label, len(pairs), *estimate_difference(pairs, params), {}, is_difference=True))
    guesses = [1 / row["choices"] for row in rows if row["choices"]]
    return Group(name, lines, sum(guesses) / len(guesses) if guesses else None)


def change_by_slice(pairs: Sequence[tuple[Score, Score]]) -> list[SliceChange]:
    """Return the change of each slice, the largest loss first."""
    found: dict[str, list[float]] = defaultdict(list)
    for ours, theirs in pairs:
        found[f"{ours['benchmark']}/{ours['slice']}"].append(ours["score"] - theirs["score"])
    changes = [SliceChange(name, len(all_), float(np.mean(all_))) for name, all_ in found.items()]
    return sorted(changes, key=lambda one: (one.mean, one.name))


def pair(rows: Sequence[Score], reference: str) -> list[tuple[Score, Score]]:
    """Pair the candidate's scores with the reference's; items without both scores are left out."""
    scored = {(row["model"], row["benchmark"], row["item"]): row for row in rows if row["status"] == "ok"}
    return [
        (row, scored[reference, benchmark, item])
        for (model, benchmark, item), row in sorted(scored.items())
        if model == "candidate" and (reference, benchmark, item) in scored
    ]


class Move(Score):
    """The candidate's score of an item, next to its reference's.

    Attributes:
        before: Answer of the reference.
        score_before: Score of the reference, or its loss per token.
        score_after: Score of the candidate, or its loss per token.
    """

    before: str
    score_before: float
    score_after: float


@dataclass(frozen=True, slots=True)
class Moves:
    """Items on which the candidate differs most from its reference, the largest first.

    Attributes:
        gains: Items where the candidate is better; at most `ITEMS`.
        regressions: Items where it is worse; at most `ITEMS`.
        n_gains: Number of all items where it is better.
        n_regressions: Number of all items where it is worse.
        n_equal: Number of items where both are equal.
    """

    gains: list[Move]
    regressions: list[Move]
    n_gains: int
    n_regressions: int
    n_equal: int


def find_moves(pairs: Sequence[tuple[Score, Score]]) -> Moves:
    """Find the items with the largest differences; held-out examples are compared by loss per token.

    Ties are ordered by the digest of the item, so that no slice fills the list because of its name.
    """
    moves: list[Move] = [
        {
            **candidate,
            "before": reference["answer"],
            "score_before": item_score(reference),
            "score_after": item_score(candidate),
        }
        for candidate, reference in pairs
    ]
    moves.sort(key=lambda move: (-abs(_gain(move)), text_digest(move["benchmark"], move["item"])))
    gains = [move for move in moves if _gain(move) > 0]
    regressions = [move for move in moves if _gain(move) < 0]
    equal = len(moves) - len(gains) - len(regressions)
    return Moves(gains[:ITEMS], regressions[:ITEMS], len(gains), len(regressions), equal)


def item_score(row: Score) -> float:
    """Return the score of an answer, or the loss per token of a held-out example.

    Example:
        >>> item_score({"benchmark": "test", "score": 6.0, "tokens": 4})
        1.5
    """
    return float(row["score"] / row["tokens"] if row["benchmark"] == HELDOUT else row["score"])


def _gain(move: Move) -> float:
    """Return the candidate's gain; a lower loss is better."""
    difference = move["score_after"] - move["score_before"]
    return float(-difference if move["benchmark"] == HELDOUT else difference)


def _ends(lines: Iterable[Line]) -> list[float]:
    """Return all finite means and interval ends of the lines."""
    return [end for line in lines for end in (line.mean, line.low, line.high) if np.isfinite(end)]
