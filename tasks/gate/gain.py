"""The gain of the candidate over its reference: measured, and checked for significance.

It is a gain of accuracy on the benchmarks that count, or without any a reduction of the loss on the test set.
"""

import math
from typing import Any, cast

import numpy as np

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.gain import ACCURACY, LOSS, Gain, describe_loss_change
from nightshift.data.statistics import (
    Differences,
    Estimate,
    interval,
    items_needed,
    p_value,
    power,
    seed_band,
    spent_alpha,
    token_mean,
)
from tasks.gate import GateParams
from tasks.gate.checks import (
    MORE_EXAMPLES,
    Check,
    check_few,
    check_figures,
    check_loss,
    format_change,
    format_points,
)
from tasks.gate.pairs import Pairs, by_benchmark, differences


def measure_gain(pairs: Pairs, look: int, params: GateParams) -> Gain | None:
    """Measure the gain of accuracy on all items of the benchmarks that count; None without any.

    Args:
        pairs: Scores of candidate and reference.
        look: Number of this look, from 1.
        params: Thresholds.
    """
    if not pairs:
        return None
    found = differences(pairs)
    ends = interval(found, params.alpha, params.n_resamples, params.seed)
    names = [name for name, _ in by_benchmark(pairs)]
    gain = _gain((float(found.mean()), *ends), found, found, params.detectable_gain, look, params)
    return cast("Gain", {"unit": ACCURACY, "benchmarks": names, **gain})


def measure_loss_gain(
    pairs: Pairs, losses: tuple[float, float], look: int, params: GateParams
) -> Gain | None:
    """Measure by how much the token-weighted loss on the test set is lower, in nats per token.

    Args:
        pairs: Losses of candidate and reference, summed over each test example.
        losses: The same in nats per token, over all of them.
        look: Number of this look, from 1.
        params: Thresholds.

    Returns:
        The gain; None without test examples, or if a loss is not a number.
    """
    if not pairs or not all(map(math.isfinite, losses)):
        return None
    found = -differences(pairs)
    tokens = np.asarray([candidate["tokens"] for candidate, _ in pairs])
    estimate = token_mean(found, tokens, params)
    detectable = params.detectable_loss_gain * losses[1]
    # The test compares sums over examples. These are the sums if the gain were `detectable` on every token,
    # in units of the mean number of tokens.
    shifted = (found - (estimate[0] - detectable) * tokens) / tokens.mean()
    gain = _gain(estimate, found, shifted, detectable, look, params)
    return cast("Gain", {"unit": LOSS, "benchmarks": [HELDOUT], **gain})


def _gain(
    estimate: Estimate,
    found: Differences,
    spread: Differences,
    detectable: float,
    look: int,
    params: GateParams,
) -> dict[str, Any]:
    """Return the figures of both kinds of gain; `spread` has the spread that the power depends on."""
    spent = spent_alpha(params.alpha, look)
    mean, low, high = estimate
    values = {
        "mean": mean,
        "low": low,
        "high": high,
        "alpha": params.alpha,
        "spent": spent,
        "detectable": detectable,
        "power": power(spread, detectable, spent),
        "items_needed": items_needed(spread, detectable, spent, params.power),
        "p_value": p_value(found, params.n_resamples, params.seed, alpha=spent),
    }
    # Significant digits: the level of the hundredth look has five zeros after the point.
    rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
    return rounded | {"look": look, "items": len(found)}


def check_gain(gain: Gain | None, params: GateParams) -> Check:
    """Check the gain of accuracy; None if no item was answered by both models."""
    count = gain["items"] if gain else 0
    if gain is None or count < params.min_items:
        # Each benchmark has a check of its own that names the remedy.
        return Check("gain", "hold", f"not judged on {count} items")
    change = format_change(gain["mean"], gain["low"], gain["high"], params)
    message = f"{change} on {gain['items']:,} items"
    target = f"a gain of {format_points(params.detectable_gain)}"
    band = seed_band(params.seed_noise, params.alpha)
    return _check(gain, message, target, "items", band, params)


def check_loss_gain(
    gain: Gain | None, pairs: Pairs, losses: tuple[float, float], params: GateParams
) -> Check:
    """Check the gain on the test set, from the arguments of `measure_loss_gain`."""
    if len(pairs) < params.min_items:
        return check_few("gain", len(pairs), "test examples", MORE_EXAMPLES, params)
    if gain is None:
        return check_loss(*losses, params.max_loss_increase)
    message = describe_loss_change({"gain": gain, "loss": losses[0], "reference_loss": losses[1]})
    target = f"a loss lower by {params.detectable_loss_gain:.1%}"
    # How much the seed changes the loss is not known.
    return _check(gain, message, target, "test examples", 0.0, params)


def _check(gain: Gain, message: str, target: str, items: str, band: float, params: GateParams) -> Check:
    """Check whether a gain is significant at the level that this look may spend, and above the seed noise."""
    figures = (gain["p_value"], gain["spent"], gain["mean"], band)
    if gain["p_value"] > gain["spent"]:
        message += f"; p {gain['p_value']:.3g} exceeds {gain['spent']:.3g}"
        if gain["look"] > 1:
            message += f", the limit for candidate {gain['look']} since the last promotion"
        message += f"; {target} would be found with probability {gain['power']:.0%}"
        if gain["power"] < params.power:
            message += f", with {gain['items_needed']:,.0f} {items} with probability {params.power:.0%}"
        return check_figures("gain", "hold", f"not shown: {message}", *figures)
    if gain["mean"] < 0:
        return check_figures("gain", "reject", f"worse: {message}", *figures)
    if gain["mean"] <= band:
        return check_figures(
            "gain", "hold", f"within seed noise ({format_points(band)}): {message}", *figures
        )
    return check_figures("gain", "promote", f"better: {message}", *figures)
