"""Learning rates equal those of transformers and torch at every step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules
from transformers import get_scheduler

from nightshift.core.errors import ConfigError
from tasks.sft import SCHEDULE_KWARGS, SchedulerKwargs
from tasks.sft.schedule import learning_rates, warmup_steps
from tests.helpers.sft import sft_params

STEPS, PEAK = 40, 0.1


def rates(kind: str, warmup: int, **kwargs: Any) -> list[float]:
    given = sft_params(
        learning_rate=PEAK, lr_scheduler_type=kind, warmup_steps=warmup, lr_scheduler_kwargs=kwargs
    )
    return learning_rates(STEPS, given)


def reference_rates(build: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = build(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("kind", "kwargs", "name", "specific"),
    [
        ("constant", {}, "constant_with_warmup", {}),
        ("linear", {}, "linear", {}),
        ("cosine", {}, "cosine", {}),
        ("cosine", {"min_lr_rate": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_restarts", {"num_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ("inverse_sqrt", {"timescale": 12}, "inverse_sqrt", {"timescale": 12}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 10, "min_lr_rate": 0.2},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "min_lr_ratio": 0.2},
        ),
    ],
)
def test_schedules_match_transformers(
    kind: str, kwargs: dict[str, Any], name: str, specific: dict[str, Any], warmup: int
) -> None:
    expected = reference_rates(
        lambda optimizer: get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=STEPS,
            scheduler_specific_kwargs=specific,
        )
    )
    # transformers' warmup_stable_decay starts at the minimum; ours, like all other schedules, at 0.
    start = warmup if kind == "warmup_stable_decay" else 0
    assert rates(kind, warmup, **kwargs)[start:] == pytest.approx(expected[start:])


@pytest.mark.parametrize(
    ("kind", "kwargs", "build"),
    [
        (
            "step",
            {"step_size": 6, "gamma": 0.5},
            lambda o: torch_schedules.StepLR(o, step_size=6, gamma=0.5),
        ),
        ("exponential", {"gamma": 0.9}, lambda o: torch_schedules.ExponentialLR(o, gamma=0.9)),
        (
            "one_cycle",
            {"pct_start": 0.25},
            lambda o: torch_schedules.OneCycleLR(o, max_lr=PEAK, total_steps=STEPS, pct_start=0.25),
        ),
    ],
)
def test_schedules_match_torch(kind: str, kwargs: dict[str, Any], build: Any) -> None:
    assert rates(kind, 0, **kwargs) == pytest.approx(reference_rates(build))


def test_every_schedule_warms_up_and_stays_within_its_peak() -> None:
    needed = {"step_size": 5, "gamma": 0.9, "num_cycles": 2, "num_decay_steps": 4}
    for kind, takes in SCHEDULE_KWARGS.items():
        kwargs = {key: value for key, value in needed.items() if key in takes}
        more = {"eval_steps": 5} if kind == "reduce_lr_on_plateau" else {}
        warmup = 0 if kind == "one_cycle" else 4
        given = sft_params(
            lr_scheduler_type=kind,
            lr_scheduler_kwargs=kwargs,
            warmup_steps=warmup,
            learning_rate=PEAK,
            **more,
        )
        found = learning_rates(STEPS, given)
        assert max(found) == pytest.approx(PEAK, rel=1e-3), kind
        assert found[:warmup] == pytest.approx([PEAK * i / 4 for i in range(warmup)]), kind
        assert min(found) >= 0, kind


def test_warmup_ratio_is_a_fraction_of_all_steps() -> None:
    assert warmup_steps(50, sft_params(warmup_steps=0, warmup_ratio=0.1)) == 5
    assert warmup_steps(51, sft_params(warmup_steps=0, warmup_ratio=0.1)) == 6


def test_a_decay_that_leaves_no_step_is_rejected() -> None:
    given = sft_params(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 39}, warmup_steps=1
    )
    with pytest.raises(ConfigError, match="1 warmup and 39 decay steps, but training has only 40 steps"):
        learning_rates(STEPS, given)


@pytest.mark.parametrize(("share", "steps"), [(0.1, 10), (0.05, 20), (0.2, 5), (0.25, 4), (0.5, 2)])
def test_one_cycle_with_a_single_step_of_increase_starts_at_the_peak(share: float, steps: int) -> None:
    kwargs = SchedulerKwargs(pct_start=share)
    params = sft_params(
        lr_scheduler_type="one_cycle", lr_scheduler_kwargs=kwargs, warmup_steps=0, learning_rate=0.5
    )
    rates = learning_rates(steps, params)
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.5 / 25 / 1e4)
