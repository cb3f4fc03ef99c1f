"""Paired scores of the candidate and another model."""

import math
from collections import defaultdict
from collections.abc import Sequence

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score

Pairs = list[tuple[Score, Score]]


def key(row: Score) -> tuple[str, str]:
    """Return the key of a score: benchmark and item."""
    return row["benchmark"], row["item"]


def pair(rows: Sequence[Score], reference: str) -> Pairs:
    """Pair the candidate's scores with another model's by benchmark and item, in a fixed order."""
    scored = [row for row in rows if row["status"] == "ok"]
    other = {key(row): row for row in scored if row["model"] == reference}
    candidates = sorted((row for row in scored if row["model"] == "candidate"), key=key)
    # With different bases, one of the two models may have skipped an item.
    return [(row, other[key(row)]) for row in candidates if key(row) in other]


def by_benchmark(pairs: Pairs, *, and_slice: bool = False) -> list[tuple[str, Pairs]]:
    """Group pairs by benchmark, or by benchmark and slice."""
    groups: dict[str, Pairs] = defaultdict(list)
    for both in pairs:
        row = both[0]
        groups[f"{row['benchmark']}/{row['slice']}" if and_slice else row["benchmark"]].append(both)
    return sorted(groups.items())


def find_best(rows: Sequence[Score], benchmark: str, reference: str) -> Pairs:
    """Pair the candidate's scores with those of the best champion so far, if it is better than the reference.

    Both are compared on the items that all three models have scores for.

    Returns:
        Pairs with the model `best`; empty if the reference is as good, or `best` has no scores.
    """
    scored = [row for row in rows if row["benchmark"] == benchmark and row["status"] == "ok"]
    both = pair(scored, "best")
    reference_of = {key(row): row for row in scored if row["model"] == reference}
    common = [(best, reference_of[key(best)]) for _, best in both if key(best) in reference_of]
    if not common:
        return []
    lead = sum(best["score"] - other["score"] for best, other in common)
    # A loss is better if it is lower.
    return both if (-lead if benchmark == HELDOUT else lead) > 0 else []


def compare_losses(pairs: Pairs) -> tuple[float, float]:
    """Return the losses of candidate and reference on the same texts, in nats per candidate token.

    NaN without tokens. The tokenizer of another base splits the texts into a different number of tokens,
    so means over each model's own tokens are not comparable.

    Example:
        >>> compare_losses([({"score": 6.0, "tokens": 4}, {"score": 8.0, "tokens": 2})])
        (1.5, 2.0)
    """
    tokens = sum(candidate["tokens"] for candidate, _ in pairs)
    if not tokens:
        return math.nan, math.nan
    loss, reference_loss = (sum(both[i]["score"] for both in pairs) / tokens for i in (0, 1))
    return round(float(loss), 6), round(float(reference_loss), 6)
