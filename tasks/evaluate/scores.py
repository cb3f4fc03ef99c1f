"""The table of scores: one row for each model and item. Needs no torch, so the gate can read it."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

# score: 1 or 0 for a multiple-choice item; the summed negative log-likelihood in nats, over `tokens`
# labelled tokens, for a held-out example (benchmark "test").
SCORES = pa.schema(
    [
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("slice", pa.string()),
        ("score", pa.float64()),
        ("tokens", pa.int32()),
        ("choices", pa.int32()),
    ]
)
ALL_SCORES = pa.schema([("model", pa.string()), *SCORES])


def metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Aggregate: accuracy by benchmark and slice, and the token-weighted held-out loss.

    Returns:
        model -> {benchmark: {accuracy, items, chance, slices}, "test": {loss, items, tokens}}.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["benchmark"]].append(row)
    table: dict[str, Any] = defaultdict(dict)
    for (model, benchmark), group in sorted(groups.items()):
        table[model][benchmark] = _loss(group) if benchmark == "test" else _accuracy(group)
    return dict(table)


def _accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    slices: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        slices[row["slice"]].append(row["score"])
    return {
        "accuracy": round(sum(row["score"] for row in rows) / len(rows), 6),
        "items": len(rows),
        "chance": round(sum(1 / row["choices"] for row in rows) / len(rows), 6),
        "slices": {name: round(sum(s) / len(s), 6) for name, s in sorted(slices.items())},
    }


def _loss(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["score"] for row in rows) / tokens
    return {"loss": round(loss, 6), "items": len(rows), "tokens": tokens}
