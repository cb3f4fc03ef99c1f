"""The gain of the candidate over its reference: measured, and checked for significance."""

from typing import Any

from nightshift.data.statistics import (
    Differences,
    interval,
    items_needed,
    p_value,
    power,
    seed_band,
    spent_alpha,
)
from tasks.gate import GateParams
from tasks.gate.checks import Check, check_figures, format_change, format_points


def measure_gain(found: Differences, look: int, params: GateParams) -> dict[str, Any]:
    """Measure the gain over the reference on all items.

    Args:
        found: Candidate minus reference per item, shape (n,).
        look: Number of this look, from 1.
        params: Thresholds.

    Returns:
        mean; low and high of the interval at alpha; p_value, and spent, its limit at this look; power to
        detect `detectable_gain`; items, and items_needed to detect it with the required power.
    """
    low, high = interval(found, params.alpha, params.n_resamples, params.seed)
    spent = spent_alpha(params.alpha, look)
    values = {
        "mean": float(found.mean()),
        "low": low,
        "high": high,
        "alpha": params.alpha,
        "spent": spent,
        "power": power(found, params.detectable_gain, spent),
        "items_needed": items_needed(found, params.detectable_gain, spent, params.power),
        "p_value": p_value(found, params.n_resamples, params.seed, alpha=spent),
    }
    # Significant digits: the level of the hundredth look has five zeros after the point.
    rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
    return rounded | {"look": look, "items": len(found)}


def check_gain(gain: dict[str, Any], params: GateParams) -> Check:
    """Check whether the gain is significant at the level that this look may spend."""
    message = f"{format_change(gain['mean'], gain['low'], gain['high'], params)} on {gain['items']:,} items"
    band = seed_band(params.seed_noise, params.alpha)
    figures = (gain["p_value"], gain["spent"], gain["mean"], band)
    if gain["p_value"] > gain["spent"]:
        message += f"; p {gain['p_value']:.3g} exceeds {gain['spent']:.3g}"
        if gain["look"] > 1:
            message += f", the limit for candidate {gain['look']} since the last promotion"
        message += (
            f"; a gain of {format_points(params.detectable_gain)} would be found with probability "
            f"{gain['power']:.0%}"
        )
        if gain["power"] < params.power:
            message += f", with {gain['items_needed']:,.0f} items with probability {params.power:.0%}"
        return check_figures("gain", "hold", f"not shown: {message}", *figures)
    if gain["mean"] < 0:
        return check_figures("gain", "reject", f"worse: {message}", *figures)
    if gain["mean"] <= band:
        return check_figures(
            "gain", "hold", f"within seed noise ({format_points(band)}): {message}", *figures
        )
    return check_figures("gain", "promote", f"better: {message}", *figures)
