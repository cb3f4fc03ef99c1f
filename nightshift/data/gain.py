"""The gain in data/gate/gate.json, for the gate and everything that shows it.

The gate measures it on benchmarks, as a difference of accuracies; or on the test set, as a difference of
losses, if no benchmark counts for it. A positive gain is in favor of the candidate in both cases.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

ACCURACY, LOSS = "accuracy", "nats per token"


class Gain(TypedDict):
    """The gain over the reference; a figure that is not finite is null in the file.

    Attributes:
        unit: `accuracy` (0 to 1) or `nats per token`: unit of mean, low, high and detectable.
        benchmarks: Benchmarks that it is measured on; `test` for the test set.
        items: Number of items, or of test examples, that both models have scores for.
        clusters: Number of unrelated items: related ones count as one.
        mean: Gain, the mean over the benchmarks; of a loss, its token-weighted reduction.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        alpha: One minus the confidence of the interval.
        p_value: P-value of the one-sided paired test for a gain.
        p_value_of_loss: The same for a loss.
        level: Limit of both.
        detectable: Gain that the power is given for.
        power: Probability of detecting that gain with these items.
        items_needed: Number of items that would detect it with `gate.power`.
    """

    unit: Literal["accuracy", "nats per token"]
    benchmarks: list[str]
    items: int
    clusters: int
    mean: float
    low: float
    high: float
    alpha: float
    p_value: float
    p_value_of_loss: float
    level: float
    detectable: float
    power: float
    items_needed: float


def is_loss_gain(gate: Mapping[str, Any]) -> bool:
    """Return whether a gate.json measured a gain, and on losses; one of an earlier release has no unit."""
    return bool(gate.get("gain")) and gate["gain"].get("unit") == LOSS


def describe_loss_change(gate: Mapping[str, Any], what: str = "test examples") -> str:
    """Describe the change of the loss on the test set, from a gate.json with such a gain.

    The interval is that of the difference, as a share of the reference's loss.

    Example:
        >>> gain = {"items": 120, "mean": 0.44, "low": 0.37, "high": 0.51, "alpha": 0.05}
        >>> describe_loss_change({"gain": gain, "loss": 1.87, "reference_loss": 2.31})
        'the loss on 120 test examples fell from 2.310 to 1.870 nats per token (-19.0%, 95% interval -22.1% \
to -16.0%)'
    """
    gain, loss, before = gate["gain"], gate["loss"], gate["reference_loss"]
    old, new = f"{before:.3f}", f"{loss:.3f}"
    verb = "fell" if loss < before else "rose"
    change = f"stayed at {new}" if new == old else f"{verb} from {old} to {new}"
    text = f"the loss on {gain['items']:,} {what} {change} nats per token"
    if not before:
        return text
    # The gain is a reduction: its upper end is the lower end of the change.
    mean, low, high = (format_share(gain[key], before) for key in ("mean", "high", "low"))
    return f"{text} ({mean}, {100 * (1 - gain['alpha']):g}% interval {low} to {high})"


def format_share(reduction: float | None, loss: float) -> str:
    """Format the reduction of a loss as a change in percent; "none" if it is unknown or the loss is 0.

    Example:
        >>> format_share(0.44, 2.31), format_share(-0.1, 2.0), format_share(None, 2.0)
        ('-19.0%', '+5.0%', 'none')
    """
    # `+ 0.0` turns -0.0 into 0.0.
    return f"{-100 * reduction / loss + 0.0:+.1f}%" if reduction is not None and loss else "none"
