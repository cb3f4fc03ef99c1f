"""Properties of the verdict by the loss on the test set."""

import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.data.statistics import p_value
from tasks.gate.decision import decide
from tests.helpers.gate import PARAMS as SHIPPED
from tests.helpers.report import heldout

# One candidate, so that some of these are promoted.
PARAMS = SHIPPED.model_copy(update={"n_resamples": 1000, "min_items": 10, "nights": 1})
# Loss of both models in nats per token, and the number of tokens.
EXAMPLE = st.tuples(st.floats(0.01, 8.0), st.floats(0.01, 8.0), st.integers(1, 500))
EXAMPLES = st.lists(EXAMPLE, min_size=10, max_size=40)
# The candidate is better on each of these examples.
BETTER = st.lists(EXAMPLE.map(lambda one: (one[0], one[0] + one[1], one[2])), min_size=12, max_size=40)
Examples = list[tuple[float, float, int]]


def rows(examples: Examples) -> list[dict[str, Any]]:
    return [
        heldout(model, f"t{number}", one[side] * one[2], one[2])
        for side, model in enumerate(("candidate", "base"))
        for number, one in enumerate(examples)
    ]


def judge(scores: list[dict[str, Any]]) -> dict[str, Any]:
    return decide(scores, {"base": None, "candidate": "c"}, (), PARAMS)


def swapped(examples: Examples) -> Examples:
    return [(theirs, ours, tokens) for ours, theirs, tokens in examples]


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.randoms(use_true_random=False))
def test_the_order_of_the_examples_changes_nothing(examples: Examples, chance: random.Random) -> None:
    scores = rows(examples)
    expected = judge(scores)
    chance.shuffle(scores)
    assert judge(scores) == expected


@settings(max_examples=60, deadline=None)
@given(st.one_of(EXAMPLES, BETTER))
def test_swapping_the_models_mirrors_the_verdict(examples: Examples) -> None:
    mirrored = {"promote": "reject", "reject": "promote", "hold": "hold"}
    here, there = judge(rows(examples)), judge(rows(swapped(examples)))
    assert there["verdict"] == mirrored[here["verdict"]]
    assert there["gain"]["p_value"] == here["gain"]["p_value_of_loss"]
    assert there["gain"]["mean"] == -here["gain"]["mean"]


@settings(max_examples=30, deadline=None)
@given(BETTER)
def test_a_model_that_is_better_on_every_example_is_promoted(examples: Examples) -> None:
    assert judge(rows(examples))["verdict"] == "promote"


@settings(max_examples=30, deadline=None)
@given(EXAMPLES)
def test_a_copy_of_the_reference_is_held(examples: Examples) -> None:
    decision = judge(rows([(theirs, theirs, tokens) for _, theirs, tokens in examples]))
    assert (decision["verdict"], decision["gain"]["mean"], decision["gain"]["p_value"]) == ("hold", 0.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.integers(2, 5))
def test_more_examples_of_the_same_kind_never_lower_the_power(examples: Examples, times: int) -> None:
    fewer, more = judge(rows(examples))["gain"], judge(rows(examples * times))["gain"]
    assert more["power"] >= fewer["power"] - 1e-6
    assert more["mean"] == np.float64(fewer["mean"]) or abs(more["mean"] - fewer["mean"]) < 1e-5


def drawn(chance: np.random.Generator, count: int, gain: float) -> tuple[Any, Any]:
    """Return differences of summed losses, and tokens: long tails, as in chats; `gain` in nats per token."""
    tokens = np.ceil(np.exp(chance.normal(4, 1, count)))
    return (gain + 0.15 * chance.standard_t(4, count)) * tokens, tokens


def test_chance_is_promoted_less_often_than_alpha() -> None:
    chance = np.random.default_rng(0)
    promoted = rejected = 0
    for seed in range(2000):
        found, _ = drawn(chance, 50, 0.0)
        promoted += p_value(found, 1000, seed, 0.05) <= 0.05
        rejected += p_value(-found, 1000, seed, 0.05) <= 0.05
    # 100 of 2000 each, with a standard deviation of 9.7.
    assert 70 <= promoted <= 130
    assert 70 <= rejected <= 130


def test_the_power_predicts_how_often_a_lower_loss_is_promoted() -> None:
    chance = np.random.default_rng(1)
    predicted, promoted = [], 0
    for _ in range(60):
        found, tokens = drawn(chance, 200, 0.04)
        examples = [(2.0 - one / n, 2.0, int(n)) for one, n in zip(found, tokens, strict=True)]
        decision = judge(rows(examples))
        predicted.append(decision["gain"]["power"])
        promoted += decision["verdict"] == "promote"
    # 2% of a loss of 2.0 is 0.04. The standard deviation of 60 such verdicts is 6 points.
    assert abs(promoted / 60 - np.mean(predicted)) < 0.2
