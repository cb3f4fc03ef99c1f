"""Learning rate schedules: one formula each, used by both the plan and the trainer.

A learning rate depends only on the step, so it is the same under every strategy and after every resume.
The exception is `reduce_lr_on_plateau`: its plan contains the learning rate without reductions.

Sources: transformers.optimization for linear, cosine, inverse_sqrt and warmup_stable_decay; torch's
StepLR, ExponentialLR and OneCycleLR (Smith and Topin, arXiv 1708.07120) for the others.
"""

import math
from collections.abc import Callable

from nightshift.core.errors import ConfigError
from tasks.sft import SchedulerKwargs, SftParams

Kwargs = SchedulerKwargs


def learning_rates(steps: int, params: SftParams) -> list[float]:
    """Compute the learning rate of every optimizer step, shape (steps,).

    Raises:
        ConfigError: Warmup and decay do not fit into the training run.
    """
    warmup = warmup_steps(steps, params)
    decay = params.lr_scheduler_kwargs.num_decay_steps or 0
    if warmup + decay >= steps:
        raise ConfigError(
            f"params.yaml: sft has {warmup} warmup and {decay} decay steps, but training has only {steps} "
            "steps; lower them, or train longer"
        )
    return [params.learning_rate * factor(step, steps, warmup, params) for step in range(steps)]


def warmup_steps(steps: int, params: SftParams) -> int:
    """Return the warmup steps: the given number, or a fraction of all steps, rounded up."""
    return params.warmup_steps or math.ceil(params.warmup_ratio * steps)


def factor(step: int, steps: int, warmup: int, params: SftParams) -> float:
    """Return the learning rate of one step as a fraction of the peak, 0 to 1.

    Args:
        step: Optimizer step, from 0.
        steps: Total number of optimizer steps.
        warmup: Number of linear warmup steps from 0.
        params: Schedule type and its keyword arguments.
    """
    if step < warmup:
        return step / warmup
    shape = SHAPES[params.lr_scheduler_type]
    return shape(step - warmup, steps - warmup, warmup, params.lr_scheduler_kwargs)


def _constant(_step: int, _steps: int, _warmup: int, _kwargs: Kwargs) -> float:
    return 1.0


def _linear(step: int, steps: int, _warmup: int, _kwargs: Kwargs) -> float:
    return 1 - step / steps


def _step(step: int, _steps: int, _warmup: int, kwargs: Kwargs) -> float:
    return float((kwargs.gamma or 0.1) ** (step // (kwargs.step_size or 1)))


def _exponential(step: int, _steps: int, _warmup: int, kwargs: Kwargs) -> float:
    return float((kwargs.gamma or 0.999) ** step)


def _cosine(step: int, steps: int, _warmup: int, kwargs: Kwargs) -> float:
    return _above(kwargs.min_lr_rate, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _cosine_with_restarts(step: int, steps: int, _warmup: int, kwargs: Kwargs) -> float:
    position = (kwargs.num_cycles or 1) * step / steps % 1
    return _above(kwargs.min_lr_rate, 0.5 * (1 + math.cos(math.pi * position)))


def _one_cycle(step: int, steps: int, _warmup: int, kwargs: Kwargs) -> float:
    """Rise from 1/div_factor to 1, then fall to 1/(div_factor * final_div_factor), both by cosine."""
    low = 1 / (kwargs.div_factor or 25)
    end = low / (kwargs.final_div_factor or 1e4)
    peak = (kwargs.pct_start or 0.3) * steps - 1
    if step <= peak:
        # The first step may be the peak itself.
        share = step / peak if peak else 1.0
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * share))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - peak) / (steps - 1 - peak)))


def _inverse_sqrt(step: int, _steps: int, warmup: int, kwargs: Kwargs) -> float:
    timescale = kwargs.timescale or warmup or 10_000
    return 1 / math.sqrt((step + timescale) / timescale)


def _warmup_stable_decay(step: int, steps: int, _warmup: int, kwargs: Kwargs) -> float:
    decay = kwargs.num_decay_steps or 1
    done = max(0, step - (steps - decay))
    return _above(kwargs.min_lr_rate, 0.5 * (1 + math.cos(math.pi * done / decay)))


def _above(minimum: float | None, share: float) -> float:
    """Rescale a share from 0..1 to minimum..1."""
    low = minimum or 0.0
    return low + (1 - low) * share


SHAPES: dict[str, Callable[[int, int, int, Kwargs], float]] = {
    "constant": _constant,
    "linear": _linear,
    "step": _step,
    "exponential": _exponential,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "one_cycle": _one_cycle,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "reduce_lr_on_plateau": _constant,
}
