"""Decide whether the candidate may replace what runs now: data/evaluate -> data/gate.

The same items are answered by the candidate and by its reference (the champion, or the base if
there is none), so the test is paired. Verdicts:

- promote: the interval of the accuracy gain lies above zero, and the held-out loss did not grow too far;
- hold: the data cannot tell, or the candidate is the champion;
- reject: the interval lies below zero, or the held-out loss grew too far;
- error: scores are missing or not numbers. Errors fail closed.

Every look at another candidate since the last promotion makes chance gains likelier, so the k-th
look spends alpha * 6 / (pi k)^2 of the error probability, which sums to alpha over all looks.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from scipy.stats import bootstrap

from tasks.config import StageParams, load_params
from tasks.files import read_json, read_rows, write_json
from tasks.stage import DATA, run_main, write_summary

SCORES = DATA / "evaluate" / "scores.parquet"
MODELS = DATA / "evaluate" / "models.json"
CHAMPION = DATA / "champion" / "champion.json"
TARGET = DATA / "gate" / "gate.json"
Row = dict[str, Any]


class GateParams(StageParams):
    """How sure the gate must be.

    Attributes:
        confidence: Confidence of the interval at the first look.
        n_resamples: Bootstrap resamples.
        max_loss_increase: Accepted relative growth of the held-out loss.
        min_items: Fewest paired items for a verdict.
        seed: Seed of the resampling.
    """

    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    n_resamples: Annotated[int, Field(strict=True, ge=1000)]
    max_loss_increase: Annotated[float, Field(ge=0, le=1)]
    min_items: Annotated[int, Field(strict=True, ge=2)]
    seed: Annotated[int, Field(strict=True, ge=0)]


def main() -> None:
    """Compare and write the verdict with its evidence."""
    params = load_params(GateParams, "gate")
    rows = read_rows(SCORES)
    decision = decide(rows, read_json(MODELS), read_json(CHAMPION)["looks"], params)
    write_json(TARGET, decision)
    write_summary("gate", rows_in=len(rows), rows_out=len(rows), verdict=decision["verdict"])


def decide(
    rows: Sequence[Row], digests: dict[str, str | None], looks: Sequence[str], params: GateParams
) -> dict[str, Any]:
    """Reach a verdict.

    Args:
        rows: Scores of all models.
        digests: model -> digest of its adapter.
        looks: Digests of the candidates judged since the last promotion, oldest first.
        params: Thresholds.

    Returns:
        verdict, reason in words, reference, and the evidence: gain with its interval at
        `confidence`, the decisive interval (corrected for the number of looks), and the losses.
    """
    reference = "champion" if "champion" in digests else "base"
    evidence: dict[str, Any] = {"reference": reference, "candidate": digests.get("candidate")}
    if digests.get("candidate") == digests.get(reference):
        return {**evidence, "verdict": "hold", "reason": f"the candidate is the {reference}"}
    correct = paired(rows, reference, is_test=False)
    heldout = paired(rows, reference, is_test=True)
    if fault := find_fault(correct, heldout, params.min_items):
        return {**evidence, "verdict": "error", "reason": fault}
    look = count_look(str(digests["candidate"]), looks)
    alpha = 1 - params.confidence
    scores = [(c["score"], r["score"]) for c, r in correct if r]
    gain = mean_interval(scores, alpha, params)
    decisive = mean_interval(scores, alpha * 6 / (math.pi * look) ** 2, params)
    losses = [token_loss([pair[side] for pair in heldout]) for side in (0, 1)]
    evidence |= {"gain": gain, "decisive": {**decisive, "look": look}}
    evidence |= {"loss": losses[0], "reference_loss": losses[1]}
    return {**evidence, **verdict(decisive, losses, params.max_loss_increase)}


def verdict(interval: dict[str, Any], losses: Sequence[float], max_loss_increase: float) -> dict[str, str]:
    """Turn the evidence into a verdict and its reason.

    Example:
        >>> verdict({"mean": 0.1, "low": 0.05, "high": 0.15}, [2.0, 2.1], 0.05)["verdict"]
        'promote'
        >>> verdict({"mean": 0.1, "low": -0.05, "high": 0.15}, [2.0, 2.1], 0.05)["verdict"]
        'hold'
    """
    low, high = interval["low"], interval["high"]
    said = f"{interval['mean']:+.1%} accuracy, interval {low:+.1%} to {high:+.1%}"
    if losses[0] > losses[1] * (1 + max_loss_increase):
        return {
            "verdict": "reject",
            "reason": f"held-out loss {losses[0]:.3f}, the reference has {losses[1]:.3f}; {said}",
        }
    if high < 0:
        return {"verdict": "reject", "reason": f"worse: {said}"}
    if low > 0:
        return {"verdict": "promote", "reason": f"better: {said}"}
    return {"verdict": "hold", "reason": f"cannot tell: {said}"}


def paired(rows: Sequence[Row], reference: str, *, is_test: bool) -> list[tuple[Row, Row | None]]:
    """Pair the candidate's rows with the reference's, by benchmark and item, in a fixed order."""
    sides: dict[str, dict[tuple[str, str], Row]] = {"candidate": {}, reference: {}}
    for row in rows:
        if row["model"] in sides and (row["benchmark"] == "test") == is_test:
            sides[row["model"]][row["benchmark"], row["item"]] = row
    keys = sorted(sides["candidate"].keys() | sides[reference].keys())
    return [(sides["candidate"].get(k), sides[reference].get(k)) for k in keys]  # type: ignore[misc]


def find_fault(
    correct: Sequence[tuple[Row, Row | None]],
    heldout: Sequence[tuple[Row, Row | None]],
    least: int,
) -> str | None:
    """Say why the scores allow no verdict, or None."""
    pairs = [*correct, *heldout]
    if alone := sum(None in pair for pair in pairs):
        return f"{alone} items have a score from one model only; run evaluate again"
    if bad := sum(not math.isfinite(row["score"]) for pair in pairs for row in pair if row):
        return f"{bad} scores are not numbers; the model is broken"
    if len(correct) < least:
        return f"{len(correct)} benchmark items, fewer than gate.min_items={least}; add items"
    if not heldout:
        return "the held-out split is empty; raise split.test_share or add data"
    return None


def count_look(candidate: str, looks: Sequence[str]) -> int:
    """Number this look, from 1; a candidate that was judged before keeps its number.

    Example:
        >>> count_look("b", ["a", "b", "c"]), count_look("d", ["a", "b", "c"])
        (2, 4)
    """
    return looks.index(candidate) + 1 if candidate in looks else len(looks) + 1


def mean_interval(pairs: Sequence[tuple[float, float]], alpha: float, params: GateParams) -> dict[str, Any]:
    """Bootstrap interval (BCa) of the mean paired difference.

    Args:
        pairs: (candidate, reference) scores of each item, shape (n, 2).
        alpha: Error probability of the two-sided interval.
        params: Resamples and seed.

    Source: Efron (1987), through scipy.stats.bootstrap.
    """
    differences = np.asarray([candidate - reference for candidate, reference in pairs])
    mean = float(differences.mean())
    low = high = mean
    # Equal differences have no spread to resample.
    if differences.std() > 0:
        low, high = bootstrap(
            (differences,),
            np.mean,
            confidence_level=1 - alpha,
            n_resamples=params.n_resamples,
            rng=np.random.default_rng(params.seed),
        ).confidence_interval
    values = {"mean": mean, "low": float(low), "high": float(high), "alpha": alpha}
    return {name: round(value, 6) for name, value in values.items()} | {"items": len(pairs)}


def token_loss(rows: Sequence[Row | None]) -> float:
    """Token-weighted mean negative log-likelihood, in nats per token."""
    kept = [row for row in rows if row]
    return round(float(sum(row["score"] for row in kept) / sum(row["tokens"] for row in kept)), 6)


if __name__ == "__main__":
    run_main(main)
