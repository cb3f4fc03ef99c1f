"""The plan: exact steps, rows, tokens and learning rates."""

from typing import Any

import pytest

from nightshift.core.errors import ConfigError
from tasks.sft.plan import FILLER, compile_plan
from tasks.sft.result import resolve_intervals
from tests.helpers.sft import sft_params as params


def test_every_row_trains_once_per_epoch_and_fillers_only_complete_the_last_step() -> None:
    plan = compile_plan(params(), [[10], [15, 5], [30]], [1, 2, 3])
    assert plan.steps == 2
    assert plan.fillers == 2
    assert sorted(plan.order[:3]) == sorted(plan.order[3:6]) == [0, 1, 2]
    assert plan.order[6:] == [FILLER, FILLER]
    assert sum(plan.tokens) == 120
    assert sum(plan.supervised_tokens) == 12
    assert plan.learning_rate == [0.0, 0.1]


def test_rows_trained_in_parallel_have_similar_cost() -> None:
    # Attention cost is the sum of squared lengths: 64 * 1 (many short examples) to 64 * 64 (one long).
    kinds = [[1] * 64, [8] * 8, [16] * 4, [32, 32], [64]]
    rows = [kinds[i % 5] for i in range(400)]
    plan = compile_plan(params(num_processes=4, gradient_accumulation_steps=1), rows, [1] * 400)
    cost = {i: sum(length**2 for length in lengths) for i, lengths in enumerate(rows)}
    groups = [[cost[row] for row in plan.order[i : i + 4]] for i in range(0, 800, 4)]
    waiting = sum(4 * max(group) for group in groups) / sum(sum(group) for group in groups)
    assert waiting < 1.1
    # In a shuffled order that ignores cost, the average group waits for twice its work.
    by_rank = [sum(cost[row] for row in plan.order[rank::4]) for rank in range(4)]
    assert max(by_rank) / min(by_rank) < 1.1


@pytest.mark.parametrize(
    ("changes", "evaluation", "saving"),
    [
        ({"eval_steps": 1 / 12, "save_steps": 1 / 3}, 9, 34),
        ({"eval_steps": None, "save_steps": 7}, None, 7),
        # 0.25 of all steps are 25.25; the best model needs a multiple of save_steps.
        ({"eval_steps": 0.25, "save_steps": 1 / 12, "load_best_model_at_end": True}, 27, 9),
    ],
)
def test_intervals_as_shares_of_all_steps_are_rounded_up(
    changes: dict[str, Any], evaluation: int | None, saving: int
) -> None:
    resolved = resolve_intervals(params(**changes), 101)
    assert (resolved.eval_steps, resolved.save_steps) == (evaluation, saving)
    assert type(resolved.save_steps) is int


def test_max_steps_truncates_the_plan() -> None:
    plan = compile_plan(params(num_train_epochs=9, max_steps=3), [[10]] * 4, [1] * 4)
    assert plan.steps == len(plan.tokens) == 3
    assert len(plan.order) == 12


def test_the_seed_determines_the_row_order() -> None:
    orders = [compile_plan(params(seed=s), [[1]] * 50, [1] * 50).order for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_warmup_longer_than_the_training_run_is_rejected() -> None:
    with pytest.raises(
        ConfigError, match="sft has 2 warmup and 0 decay steps, but training has only 2 steps"
    ):
        compile_plan(params(warmup_steps=2), [[10], [20], [30]], [1, 2, 3])
