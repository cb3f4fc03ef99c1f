"""The training plan: every step, its rows, tokens and learning rate, known before launch.

The plan fixes the order of the rows, so training is one sequential pass over it: a resumed run
cannot see other rows, and a run either executes its plan or fails.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

from tasks.errors import ConfigError
from tasks.sft import SftParams

# A row of no example and no label. It fills the last step, so that all ranks do equal work and no
# real row is repeated to make up the number.
FILLER = -1


def compile_plan(params: SftParams, tokens: Sequence[int], supervised: Sequence[int]) -> dict[str, Any]:
    """Compile the exact course of a training.

    Args:
        params: Hyper-parameters.
        tokens: Real tokens of each packed row, shape (n_rows,).
        supervised: Labelled tokens of each packed row, shape (n_rows,).

    Returns:
        steps; order: row numbers in the order of training, FILLER for none; and for each step
        its tokens, supervised tokens and learning rate, shape (steps,).

    Raises:
        ConfigError: The warm-up is longer than the training.
    """
    step_rows = params.num_processes * params.per_device_train_batch_size * params.gradient_accumulation_steps
    order = row_order(len(tokens), params.num_train_epochs, params.seed)
    steps = math.ceil(len(order) / step_rows)
    steps = min(steps, params.max_steps or steps)
    order = order[: steps * step_rows]
    order += [FILLER] * (steps * step_rows - len(order))
    if params.warmup_steps >= steps:
        raise ConfigError(
            f"params.yaml: sft.warmup_steps={params.warmup_steps}, but the training has only "
            f"{steps} steps; lower warmup_steps or train longer"
        )
    groups = [order[i : i + step_rows] for i in range(0, len(order), step_rows)]
    return {
        "steps": steps,
        "rows_per_step": step_rows,
        "fillers": order.count(FILLER),
        "order": order,
        "tokens": [sum(tokens[i] for i in rows if i != FILLER) for rows in groups],
        "supervised_tokens": [sum(supervised[i] for i in rows if i != FILLER) for rows in groups],
        "learning_rate": [learning_rate(step, steps, params) for step in range(steps)],
    }


def row_order(rows: int, epochs: int, seed: int) -> list[int]:
    """Shuffle the rows anew for each epoch; deterministic in (rows, epochs, seed).

    Example:
        >>> sorted(row_order(3, 2, seed=0))
        [0, 0, 1, 1, 2, 2]
    """
    order = []
    for epoch in range(epochs):
        one = list(range(rows))
        random.Random(f"{seed}/{epoch}").shuffle(one)
        order += one
    return order


def learning_rate(step: int, steps: int, params: SftParams) -> float:
    """Learning rate of one optimiser step (from 0), equal to that of transformers' schedulers."""
    if step < params.warmup_steps:
        return params.learning_rate * step / max(1, params.warmup_steps)
    progress = (step - params.warmup_steps) / max(1, steps - params.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[params.lr_scheduler_type]
    return params.learning_rate * factor


def deepspeed_config(params: SftParams, precision: str) -> dict[str, Any]:
    """Generate DeepSpeed's configuration; optimiser and scheduler stay with transformers."""
    return {
        "train_micro_batch_size_per_gpu": params.per_device_train_batch_size,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": params.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": params.zero_stage},
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
