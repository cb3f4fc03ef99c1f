"""The gain of the candidate over its reference: measured, and checked for significance.

It is a gain of accuracy on the benchmarks that count, or a reduction of the loss on the test set.
"""

import math
from typing import Any, cast

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.gain import ACCURACY, LOSS, Gain, describe_loss_change
from nightshift.data.statistics import (
    Clusters,
    Estimate,
    cluster,
    clusters_needed,
    estimate_mean,
    p_value,
    power,
    seed_band,
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
from tasks.gate.pairs import Pairs, by_benchmark


def measure_gain(pairs: Pairs, params: GateParams) -> Gain | None:
    """Measure the gain of accuracy, the mean over the benchmarks that count; None without any item.

    Args:
        pairs: Scores of candidate and reference on these benchmarks.
        params: Thresholds.
    """
    if not pairs:
        return None
    groups = by_benchmark(pairs)
    # Each benchmark has the same weight; the items of the largest one count as one each.
    largest = max(len(group) for _, group in groups)
    found = cluster(pairs, {name: largest / len(group) for name, group in groups})
    estimate = estimate_mean(found, params, is_loss=False)
    gain = _gain(estimate, found, params.detectable_gain, len(pairs), params)
    return cast("Gain", {"unit": ACCURACY, "benchmarks": [name for name, _ in groups], **gain})


def measure_loss_gain(pairs: Pairs, losses: tuple[float, float], params: GateParams) -> Gain | None:
    """Measure by how much the token-weighted loss on the test set is lower, in nats per token.

    Args:
        pairs: Losses of candidate and reference, summed over each test example.
        losses: The same in nats per token, over all of them.
        params: Thresholds.

    Returns:
        The gain; None without test examples, or if a loss is not a number.
    """
    if not pairs or not all(map(math.isfinite, losses)):
        return None
    found = cluster(pairs).swap()
    estimate = estimate_mean(found, params, is_loss=True)
    gain = _gain(estimate, found, params.detectable_loss_gain * losses[1], len(pairs), params)
    return cast("Gain", {"unit": LOSS, "benchmarks": [HELDOUT], **gain})


def _gain(
    estimate: Estimate, found: Clusters, detectable: float, items: int, params: GateParams
) -> dict[str, Any]:
    """Return the figures of both kinds of gain."""
    needed = clusters_needed(found, detectable, params.level, params.power)
    values = {
        **dict(zip(("mean", "low", "high"), estimate, strict=True)),
        "alpha": params.alpha,
        "level": params.level,
        "detectable": detectable,
        "power": power(found, detectable, params.level),
        "items_needed": math.ceil(needed * items / len(found.sums)) if math.isfinite(needed) else needed,
        "p_value": p_value(found.sums, params.n_resamples, params.seed, params.level),
        "p_value_of_loss": p_value(-found.sums, params.n_resamples, params.seed, params.level),
    }
    # Significant digits: a p-value may have many zeros after the point.
    rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
    return rounded | {"items": items, "clusters": len(found.sums)}


def check_gain(gain: Gain | None, params: GateParams) -> Check:
    """Check the gain of accuracy; None if no item was answered by both models."""
    if gain is None or gain["clusters"] < params.min_items:
        # Each benchmark has a check of its own that names the remedy.
        return Check("gain", "hold", f"not judged on {gain['items'] if gain else 0} items")
    change = format_change(gain["mean"], gain["low"], gain["high"], params)
    message = f"{change} on {count_items(gain, 'items')}"
    if len(gain["benchmarks"]) > 1:
        message += f" of {len(gain['benchmarks'])} benchmarks, which count the same"
    target = f"a gain of {format_points(params.detectable_gain)}"
    band = seed_band(params.seed_noise, params.alpha)
    return _check(gain, message, target, "items", band, params)


def check_loss_gain(
    gain: Gain | None, pairs: Pairs, losses: tuple[float, float], params: GateParams
) -> Check:
    """Check the gain on the test set, from the arguments of `measure_loss_gain`."""
    what = name_examples(params)
    count = gain["clusters"] if gain else len(pairs)
    if count < params.min_items:
        return check_few("gain", count, what, MORE_EXAMPLES, params)
    if gain is None:
        return check_loss("held-out loss", *losses, params.max_loss_increase)
    message = describe_loss_change({"gain": gain, "loss": losses[0], "reference_loss": losses[1]}, what)
    target = f"a loss lower by {params.detectable_loss_gain:.1%}"
    # How much the seed changes the loss is not known.
    return _check(gain, message, target, what, 0.0, params)


def name_examples(params: GateParams) -> str:
    """Return what a gain of the loss is measured on, in words."""
    return "new test examples" if params.judges_new else "test examples"


def count_items(gain: Gain, what: str) -> str:
    """Say how many items a gain is measured on, and how many clusters they form if that is fewer."""
    items, clusters = gain["items"], gain["clusters"]
    return f"{items:,} {what}" + (f" about {clusters:,} subjects" if clusters < items else "")


def _check(gain: Gain, message: str, target: str, items: str, band: float, params: GateParams) -> Check:
    """Check whether a gain is significant at the level of one candidate, and above the seed noise."""
    figures = (gain["p_value"], gain["p_value_of_loss"], gain["mean"], band)
    if gain["p_value_of_loss"] <= gain["level"]:
        return check_figures("gain", "reject", f"worse: {message}", *figures)
    if gain["p_value"] > gain["level"]:
        message += (
            f"; p {gain['p_value']:.3g} exceeds {gain['level']:.3g} (gate.alpha / gate.nights); {target} "
            f"would be found with probability {gain['power']:.0%}"
        )
        if gain["power"] < params.power:
            message += f", with {gain['items_needed']:,.0f} {items} with probability {params.power:.0%}"
        return check_figures("gain", "hold", f"not shown: {message}", *figures)
    if gain["mean"] <= band:
        return check_figures(
            "gain", "hold", f"within seed noise ({format_points(band)}): {message}", *figures
        )
    return check_figures("gain", "promote", f"better: {message}", *figures)
