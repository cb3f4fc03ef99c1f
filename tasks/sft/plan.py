"""The training plan: every step with its rows, tokens and learning rate, fixed before launch.

The plan fixes the row order, so training is one sequential pass over it: a resumed run cannot see other
rows, and a run either executes its plan or fails.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nightshift.core.paths import PACKED
from tasks.sft import SftParams
from tasks.sft.schedule import learning_rates

# A row without examples and labels. It fills up the last step, so that all ranks do equal work and no
# real row is repeated.
FILLER = -1
# Forward passes whose rows are sorted by cost: enough to find rows of similar cost, too few to order the
# whole training run by length.
WINDOW = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """The exact course of a training run.

    Attributes:
        steps: Number of optimizer steps.
        rows_per_step: Rows of all ranks in one step.
        fillers: Number of filler rows in `order`.
        order: Row indices in training order, `FILLER` for none, shape (steps * rows_per_step,).
        tokens: Tokens of each step, shape (steps,).
        supervised_tokens: Labelled tokens of each step, shape (steps,).
        learning_rate: Learning rate of each step, shape (steps,).
    """

    steps: int
    rows_per_step: int
    fillers: int
    order: list[int]
    tokens: list[int]
    supervised_tokens: list[int]
    learning_rate: list[float]


def compile_plan(params: SftParams, seq_lengths: Sequence[Sequence[int]], supervised: Sequence[int]) -> Plan:
    """Compile the exact course of a training run.

    Args:
        params: Hyperparameters.
        seq_lengths: Token counts of the examples in each packed row, shape (n_rows, any).
        supervised: Labelled tokens of each packed row, shape (n_rows,).

    Raises:
        ConfigError: Warmup and decay are longer than the training run.
    """
    step_rows = params.ranks * params.per_device_train_batch_size * params.gradient_accumulation_steps
    tokens = [sum(lengths) for lengths in seq_lengths]
    # Full rows cost the same except for attention, which is quadratic in the length of each example.
    costs = [sum(length**2 for length in lengths) for lengths in seq_lengths]
    size = params.per_device_train_batch_size
    order = row_order(costs, params.num_train_epochs, params.ranks * size, params.seed)
    steps = math.ceil(len(order) / step_rows)
    steps = min(steps, params.max_steps or steps)
    order = order[: steps * step_rows]
    order += [FILLER] * (steps * step_rows - len(order))
    order = deal_rows(order, costs, params.ranks, size, params.seed)
    groups = [order[i : i + step_rows] for i in range(0, len(order), step_rows)]
    return Plan(
        steps=steps,
        rows_per_step=step_rows,
        fillers=order.count(FILLER),
        order=order,
        tokens=[sum(tokens[i] for i in rows if i != FILLER) for rows in groups],
        supervised_tokens=[sum(supervised[i] for i in rows if i != FILLER) for rows in groups],
        learning_rate=learning_rates(steps, params),
    )


def row_order(costs: Sequence[int], epochs: int, parallel: int, seed: int) -> list[int]:
    """Shuffle the rows anew for each epoch, so that rows trained in parallel cost about the same.

    The slowest process sets the time of a step. Rows are therefore sorted by cost within windows of the
    shuffled order, and shuffled again in groups of the rows that all processes train at once.

    Args:
        costs: Relative cost of each row, shape (n_rows,).
        epochs: Passes over the rows.
        parallel: Number of rows trained in parallel: those of one forward pass of all processes.
        seed: Seed of the shuffle; the order is a function of the arguments.

    Example:
        >>> sorted(row_order([5, 5, 5], epochs=2, parallel=1, seed=0))
        [0, 0, 1, 1, 2, 2]
        >>> order = row_order([1, 9, 1, 9], epochs=1, parallel=2, seed=0)
        >>> [sorted(order[:2]), sorted(order[2:])] in ([[0, 2], [1, 3]], [[1, 3], [0, 2]])
        True
    """
    order: list[int] = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        rows = list(range(len(costs)))
        rng.shuffle(rows)
        # The first rows complete the last group of the epoch before.
        begun = -len(order) % parallel
        order += rows[:begun]
        for start in range(begun, len(rows), WINDOW * parallel):
            window = sorted(rows[start : start + WINDOW * parallel], key=costs.__getitem__)
            groups = [window[i : i + parallel] for i in range(0, len(window), parallel)]
            # An incomplete group stays last, where the next epoch or fillers complete it.
            full = [group for group in groups if len(group) == parallel]
            rng.shuffle(full)
            for group in full:
                rng.shuffle(group)
            order += [row for group in [*full, *groups[len(full) :]] for row in group]
    return order


def deal_rows(order: Sequence[int], costs: Sequence[int], processes: int, size: int, seed: int) -> list[int]:
    """Deal the rows of each forward pass to the processes, so that each has about the same cost.

    In rounds, from the most expensive rows down, each process gets one row, and the one with the highest sum
    the cheapest. The sums then differ by no more than the rows of one round do.

    Args:
        order: Row numbers or `FILLER`; process i trains rows i * size to (i + 1) * size of each pass.
        costs: Relative cost of each row.
        processes: Number of processes.
        size: Rows of one process in a forward pass. A single row is as good in any process.
        seed: Seed of the shuffle of processes, and of the rows of each.

    Example:
        >>> deal_rows([0, 1, 2, 3], [1, 9, 2, 8], processes=2, size=2, seed=0)
        [3, 2, 1, 0]
    """
    if size == 1:
        return list(order)
    rng = random.Random(f"{seed}/deal")
    dealt: list[int] = []
    for start in range(0, len(order), processes * size):
        group = order[start : start + processes * size]
        rows = sorted(group, key=lambda row: 0 if row == FILLER else costs[row])
        hands: list[list[int]] = [[] for _ in range(processes)]
        sums = [0] * processes
        for i in range(len(rows) - processes, -1, -processes):
            dearest_first = sorted(range(processes), key=lambda process: -sums[process])
            for process, row in zip(dearest_first, rows[i : i + processes], strict=True):
                hands[process].append(row)
                sums[process] += 0 if row == FILLER else costs[row]
        rng.shuffle(hands)
        for hand in hands:
            # A micro-batch that is halved must not split into expensive and cheap rows.
            rng.shuffle(hand)
            dealt += hand
    return dealt


def without_steps(plan: Plan, steps: Sequence[int]) -> Plan:
    """Return the plan with fillers instead of the rows of some steps, counted from 1.

    Example:
        >>> plan = Plan(2, 1, 0, order=[4, 7], tokens=[9, 8], supervised_tokens=[3, 2], learning_rate=[1, 1])
        >>> without_steps(plan, [2]).order, without_steps(plan, [2]).tokens
        ([4, -1], [9, 0])
    """
    size, skipped = plan.rows_per_step, {step - 1 for step in steps}

    def emptied(counts: list[int]) -> list[int]:
        return [0 if step in skipped else count for step, count in enumerate(counts)]

    order = [FILLER if i // size in skipped else row for i, row in enumerate(plan.order)]
    return replace(
        plan,
        order=order,
        fillers=order.count(FILLER),
        tokens=emptied(plan.tokens),
        supervised_tokens=emptied(plan.supervised_tokens),
    )


def format_rows(plan: Plan, steps: range, data: Path = PACKED) -> str:
    """Format steps, counted from 1, and their rows for a message.

    Example:
        >>> format_rows(Plan(2, 2, 0, [4, 7, 1, 0], [9, 8], [3, 2], [1, 1]), range(2, 3))
        'step 2, rows [1, 0] of data/pack/train.parquet'
    """
    size = plan.rows_per_step
    rows = plan.order[(steps.start - 1) * size : (steps.stop - 1) * size]
    numbers = f"step {steps.start}" if len(steps) == 1 else f"steps {steps.start} to {steps.stop - 1}"
    return f"{numbers}, rows {rows} of {data}"
