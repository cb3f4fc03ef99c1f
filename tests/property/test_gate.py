"""Properties of the gate."""

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.data.statistics import interval, items_needed, p_value, power, seed_band, spent_alpha
from tasks.gate.decision import decide
from tests.helpers.gate import PARAMS as SHIPPED

PARAMS = SHIPPED.model_copy(update={"n_resamples": 1000, "min_items": 10})
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=10, max_size=40)


def rows(model: str, right: list[bool]) -> list[dict[str, Any]]:
    same = {"model": model, "slice": "s", "status": "ok", "answer": None}
    return [{"benchmark": "test", "item": "t", "score": 20.0, "tokens": 10, **same}] + [
        {"benchmark": "facts", "item": str(i), "score": float(ok), **same} for i, ok in enumerate(right)
    ]


def verdict(candidate: list[bool], base: list[bool]) -> str:
    table = rows("candidate", candidate) + rows("base", base)
    return str(decide(table, {"base": None, "candidate": "c"}, [], [], PARAMS)["verdict"])


@settings(max_examples=30, deadline=None)
@given(ANSWERS)
def test_a_promotion_becomes_a_rejection_when_the_models_are_swapped(
    pairs: list[tuple[bool, bool]],
) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    if verdict(ours, theirs) == "promote":
        assert verdict(theirs, ours) == "reject"


@settings(max_examples=30, deadline=None)
@given(ANSWERS)
def test_a_model_is_never_promoted_over_itself_or_for_fewer_correct_answers(
    pairs: list[tuple[bool, bool]],
) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    assert verdict(ours, ours) == "hold"
    if sum(ours) <= sum(theirs):
        assert verdict(ours, theirs) != "promote"


def alternating(items: int, spread: float) -> Any:
    """Return differences with this spread; their mean is 0 if their number is even."""
    return np.resize([spread, -spread], items)


ALPHAS = st.floats(1e-12, 0.5)
GAINS = st.floats(1e-9, 1.0)
SPREADS = st.sampled_from([0.0, 5e-324, 1e-9, 0.05, 0.3, 1.0])
COUNTS = st.one_of(st.integers(1, 5000), st.just(10**5))


@settings(max_examples=200, deadline=None)
@given(COUNTS, SPREADS, GAINS, ALPHAS)
def test_power_is_a_probability_and_grows_with_items_gain_and_alpha(
    items: int, spread: float, gain: float, alpha: float
) -> None:
    found = alternating(items, spread)
    here = power(found, gain, alpha)
    assert 0 <= here <= 1
    if items > 1:
        assert here >= alpha * (1 - 1e-9)
    assert power(found, min(1.0, 2 * gain), alpha) >= here - 1e-12
    assert power(found, gain, min(0.5, 2 * alpha)) >= here - 1e-12
    # With twice as many such items the sample standard deviation is slightly smaller, never larger.
    assert power(np.tile(found, 2), gain, alpha) >= here - 1e-12


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-12, 0.05), st.floats(0.5, 0.99))
def test_the_needed_items_have_the_power_and_fewer_do_not(gain: float, alpha: float, wanted: float) -> None:
    found = alternating(1000, 1.0)
    needed = items_needed(found, gain, alpha, wanted)
    assert math.isfinite(needed)
    if 10 < needed < 10**6:
        spread = found.std(ddof=1)

        def reached(items: int) -> float:
            one = alternating(items, 1.0)
            return power(one / one.std(ddof=1) * spread, gain, alpha)

        # The power also counts losses that look like gains: less than 1e-4 here.
        assert reached(int(needed)) >= wanted
        assert reached(int(needed) - 1) <= wanted + 1e-4


SCORES = st.lists(
    st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-1, 1)), min_size=2, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(SCORES, st.integers(1, 4000))
def test_every_statistic_of_finite_scores_is_finite(scores: list[float], look: int) -> None:
    found = np.asarray(scores)
    spent = spent_alpha(0.05, look)
    assert 0 <= p_value(found, 1000, 0, alpha=spent) <= 1
    assert 0 <= p_value(found, 1000, 0, "less", spent) <= 1
    assert 0 <= power(found, 0.1, spent) <= 1
    assert math.isfinite(seed_band(0.02, spent))
    low, high = interval(found, 0.05, 1000, 0)
    assert -1 <= low <= high <= 1
