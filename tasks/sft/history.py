"""Decisions based on past losses: early stopping, learning rate reduction, spikes, best checkpoint.

Everything is computed from the log history in every checkpoint, so a resumed run decides like an
uninterrupted one: there is no counter to lose.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

# Number of recent losses that a spike is compared with, and the minimum number required.
SPIKE_WINDOW, SPIKE_MINIMUM = 20, 5
History = Sequence[dict[str, Any]]


def evaluations(history: History) -> list[tuple[int, float]]:
    """Return (step, loss) of every evaluation.

    Example:
        >>> evaluations([{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}])
        [(2, 2.5)]
    """
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def best_step(history: History) -> int | None:
    """Return the first step with the lowest evaluation loss, or None without an evaluation."""
    losses = evaluations(history)
    return min(losses, key=lambda entry: entry[1])[0] if losses else None


def is_exhausted(history: History, patience: int | None, min_delta: float) -> bool:
    """Return whether the loss has not improved for `patience` evaluations.

    Args:
        history: Log history of the trainer.
        patience: Number of evaluations; None never stops.
        min_delta: Minimum decrease of the loss that counts as improvement, in nats per token.

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
    """Return the learning rate factor after all reductions (torch's ReduceLROnPlateau, mode rel).

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


def is_diverged(history: History, threshold: float | None, patience: int) -> bool:
    """Return whether the last `patience` logged losses all exceed a threshold.

    Example:
        >>> history = [{"step": i, "loss": loss} for i, loss in enumerate([2.0, 6.0, 7.0])]
        >>> is_diverged(history, 5.0, 2), is_diverged(history, 5.0, 3), is_diverged(history, None, 1)
        (True, False, False)
    """
    losses = [entry["loss"] for entry in history if "loss" in entry][-patience:]
    return threshold is not None and len(losses) == patience and min(losses) > threshold


def is_spike(loss: float, history: History, ratio: float | None) -> bool:
    """Return whether a loss exceeds `ratio` times the median of the last losses.

    Example:
        >>> calm = [{"step": i, "loss": 2.0} for i in range(9)]
        >>> is_spike(7.0, calm, 3.0), is_spike(5.0, calm, 3.0), is_spike(7.0, calm[:3], 3.0)
        (True, False, False)
    """
    losses = [entry["loss"] for entry in history if "loss" in entry][-SPIKE_WINDOW:]
    return ratio is not None and len(losses) >= SPIKE_MINIMUM and loss > ratio * median(losses)
