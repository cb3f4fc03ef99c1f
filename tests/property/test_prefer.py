"""Properties of the losses of pairs, and of a plan without fillers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.prefer.__main__ import complete
from tasks.prefer.trainer import first_loss, pair_loss
from tasks.sft.plan import FILLER, Plan

LENGTHS = [torch.tensor([4.0]), torch.tensor([7.0])]
GAIN = st.floats(-20, 20, width=32)


@given(GAIN, GAIN, st.floats(0.01, 2))
def test_swapped_answers_mirror_the_margin(chosen: float, rejected: float, beta: float) -> None:
    ratios = torch.tensor([[chosen, rejected]], dtype=torch.float64)
    loss = pair_loss(ratios, LENGTHS, beta, "sigmoid").item()
    swapped = pair_loss(ratios.flip(1), LENGTHS, beta, "sigmoid").item()
    margin = beta * (chosen - rejected)
    assert swapped - loss == pytest.approx(margin, abs=1e-6)
    assert (loss < math.log(2)) == (margin > 0) or abs(margin) < 1e-9


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@given(beta=st.floats(0.01, 2))
def test_a_model_that_equals_its_reference_has_the_first_loss(beta: float, loss_type: str) -> None:
    ratios = torch.zeros(1, 2, dtype=torch.float64)
    found = pair_loss(ratios, LENGTHS, beta, loss_type).item()
    assert found == pytest.approx(first_loss(beta, loss_type))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_a_plan_without_fillers_has_all_rows_and_counts_them(tokens: list[int], per_step: int) -> None:
    steps = math.ceil(len(tokens) / per_step)
    fillers = steps * per_step - len(tokens)
    order = [*range(len(tokens)), *[FILLER] * fillers]
    plan = Plan(steps, per_step, fillers, order, [0] * steps, [0] * steps, [1.0] * steps)
    full = complete(plan, tokens, tokens)
    assert full.fillers == 0
    assert FILLER not in full.order
    assert full.order[: len(tokens)] == list(range(len(tokens)))
    assert sum(full.tokens) == sum(tokens[row] for row in full.order)
