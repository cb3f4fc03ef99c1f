"""What the losses so far decide: stop, reduce the rate, which checkpoint is best.

All of it is computed from the history that every checkpoint carries, so a resumed training decides as an
undisturbed one: there is no counter that could be lost.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

# Losses among which a spike is told, and the least number of them that allow it.
SPIKE_WINDOW, SPIKE_LEAST = 20, 5
History = Sequence[dict[str, Any]]


def evaluations(history: History) -> list[tuple[int, float]]:
    """Return (step, loss) of every evaluation.

    Example:
        >>> evaluations([{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}])
        [(2, 2.5)]
    """
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def best_step(history: History) -> int | None:
    """Return the step of the lowest evaluation loss, the first of equals; None without an evaluation."""
    losses = evaluations(history)
    return min(losses, key=lambda entry: entry[1])[0] if losses else None


def is_exhausted(history: History, patience: int | None, min_delta: float) -> bool:
    """Tell whether the loss has not improved for `patience` evaluations.

    Args:
        history: What was logged.
        patience: Evaluations; None never stops.
        min_delta: Fall of the loss, nats per token, below which it has not improved.

    Example:
        >>> history = [{"step": i, "eval_loss": loss} for i, loss in enumerate([3.0, 2.0, 1.99, 1.98])]
        >>> is_exhausted(history, 2, 0.1), is_exhausted(history, 3, 0.1), is_exhausted(history, 2, 0.0)
        (True, False, False)
    """
    if patience is None:
        return False
    best, waited = math.inf, 0
    for _, loss in evaluations(history):
        if loss < best - min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= patience


def plateau_scale(history: History, factor: float, patience: int, threshold: float) -> float:
    """Return the factor of the learning rate after all reductions (torch's ReduceLROnPlateau, mode rel).

    Example:
        >>> history = [{"step": i, "eval_loss": loss} for i, loss in enumerate([2.0, 2.0, 2.0, 1.0])]
        >>> plateau_scale(history, factor=0.1, patience=1, threshold=0.0)
        0.1
    """
    scale, best, waited = 1.0, math.inf, 0
    for _, loss in evaluations(history):
        if loss < best * (1 - threshold):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            scale, waited = scale * factor, 0
    return scale


def is_spike(loss: float, history: History, ratio: float | None) -> bool:
    """Tell whether a loss is above `ratio` times the median of the last ones.

    Example:
        >>> calm = [{"step": i, "loss": 2.0} for i in range(9)]
        >>> is_spike(7.0, calm, 3.0), is_spike(5.0, calm, 3.0), is_spike(7.0, calm[:3], 3.0)
        (True, False, False)
    """
    losses = [entry["loss"] for entry in history if "loss" in entry][-SPIKE_WINDOW:]
    return ratio is not None and len(losses) >= SPIKE_LEAST and loss > ratio * median(losses)
