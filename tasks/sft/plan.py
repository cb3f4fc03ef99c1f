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
# Rows for each process among which rows of like cost are sought: enough to find them, too few to order
# the training by length.
WINDOW = 16


def compile_plan(
    params: SftParams, seq_lengths: Sequence[Sequence[int]], supervised: Sequence[int]
) -> dict[str, Any]:
    """Compile the exact course of a training.

    Args:
        params: Hyper-parameters.
        seq_lengths: Tokens of each example in each packed row, shape (n_rows, any).
        supervised: Labelled tokens of each packed row, shape (n_rows,).

    Returns:
        steps; order: row numbers in the order of training, FILLER for none; and for each step
        its tokens, supervised tokens and learning rate, shape (steps,).

    Raises:
        ConfigError: The warm-up is longer than the training.
    """
    step_rows = params.num_processes * params.per_device_train_batch_size * params.gradient_accumulation_steps
    tokens = [sum(lengths) for lengths in seq_lengths]
    # Full rows cost the same but for attention, which grows with the square of each example's length.
    costs = [sum(length**2 for length in lengths) for lengths in seq_lengths]
    order = row_order(costs, params.num_train_epochs, params.num_processes, params.seed)
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


def row_order(costs: Sequence[int], epochs: int, processes: int, seed: int) -> list[int]:
    """Shuffle the rows anew for each epoch, so that rows which train side by side cost about the same.

    The slowest process sets the time of a step. Rows are therefore sorted by cost within windows of the
    shuffled order, and shuffled again in groups of one row for each process.

    Args:
        costs: Relative cost of each row, shape (n_rows,).
        epochs: Passes over the rows.
        processes: Rows that train at the same time.
        seed: Of the shuffling; the order is a function of the arguments.

    Example:
        >>> sorted(row_order([5, 5, 5], epochs=2, processes=1, seed=0))
        [0, 0, 1, 1, 2, 2]
        >>> order = row_order([1, 9, 1, 9], epochs=1, processes=2, seed=0)
        >>> [sorted(order[:2]), sorted(order[2:])] in ([[0, 2], [1, 3]], [[1, 3], [0, 2]])
        True
    """
    order = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        one = list(range(len(costs)))
        rng.shuffle(one)
        for start in range(0, len(one), WINDOW * processes):
            window = sorted(one[start : start + WINDOW * processes], key=costs.__getitem__)
            groups = [window[i : i + processes] for i in range(0, len(window), processes)]
            # An incomplete group stays last, where fillers complete it.
            full = [group for group in groups if len(group) == processes]
            rng.shuffle(full)
            for group in full:
                rng.shuffle(group)
            order += [row for group in [*full, *groups[len(full) :]] for row in group]
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
