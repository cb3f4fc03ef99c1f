"""The score table: one row per model and item. Needs no torch, so that the gate can import it."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nightshift.data.benchmarks import HELDOUT, TEST_ANSWERS
from nightshift.data.schemas import Score

# Prefixes of the output lines that report a finished benchmark, and progress: `scoring facts 12/40`.
DONE, PROGRESS = "scored ", "scoring "
Item = TypeVar("Item")


class Part(NamedTuple):
    """One of the equal parts into which the items of a benchmark are divided, one for each process.

    Attributes:
        number: Number of the part, from 0.
        total: Number of parts.
    """

    number: int
    total: int

    def select(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of the part."""
        return items[self.number :: self.total]

    def file(self, target: Path) -> Path:
        """Return the file with the scores of this part; the target itself if there is only one."""
        return target if self.total == 1 else target.with_suffix(f".{self.number}-of-{self.total}.parquet")


WHOLE = Part(0, 1)


def join_parts(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the items of all parts in their order.

    Example:
        >>> join_parts([Part(i, 3).select("abcdefgh") for i in range(3)])
        ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']
    """
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def metrics(rows: Sequence[Score]) -> dict[str, Any]:
    """Aggregate the scores: accuracy by benchmark and slice, and the token-weighted held-out loss.

    Accuracy is the mean score, also of graded metrics (token F1, ROUGE).

    Returns:
        model -> {benchmark: {accuracy, items, errors, skipped, chance, slices}, "test": {loss,
        perplexity, items, errors, skipped, tokens, sources, new}}; `new` are the examples that are newer
        than the champion, also in `test_answers`, where it is their accuracy.
    """
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["benchmark"]].append(row)
    table: dict[str, Any] = defaultdict(dict)
    for (model, benchmark), group in sorted(groups.items()):
        scored = [row for row in group if row["status"] == "ok"]
        states = [row["status"] for row in group]
        counts = {"items": len(scored), "errors": states.count("error"), "skipped": states.count("skipped")}
        described = _heldout(scored) if benchmark == HELDOUT else _accuracy(scored)
        if benchmark == TEST_ANSWERS:
            described["new"] = _mean([row["score"] for row in scored if row.get("is_new")])
        table[model][benchmark] = described | counts
    return dict(table)


def _accuracy(rows: Sequence[Score]) -> dict[str, Any]:
    slices = {name: _mean([row["score"] for row in group]) for name, group in _by_slice(rows)}
    by_chance = [1 / row["choices"] for row in rows if row["choices"]]
    return {
        "accuracy": _mean([row["score"] for row in rows]),
        "chance": _mean(by_chance) if len(by_chance) == len(rows) else None,
        "slices": slices,
    }


def _heldout(rows: Sequence[Score]) -> dict[str, Any]:
    by_source = {name: _loss(group) for name, group in _by_slice(rows)}
    return _loss(rows) | {"sources": by_source, "new": _loss([row for row in rows if row.get("is_new")])}


def _loss(rows: Sequence[Score]) -> dict[str, Any]:
    """Return loss (nats per token) and perplexity, its exponential; None where that is 1e9 or more."""
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["score"] for row in rows) / tokens if tokens else None
    has_perplexity = loss is not None and loss < math.log(1e9)
    return {
        "loss": None if loss is None else round(loss, 6),
        "perplexity": round(math.exp(loss), 4) if has_perplexity and loss is not None else None,
        "tokens": tokens,
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def _by_slice(rows: Sequence[Score]) -> list[tuple[str, list[Score]]]:
    slices: dict[str, list[Score]] = defaultdict(list)
    for row in rows:
        slices[row["slice"]].append(row)
    return sorted(slices.items())
