"""Properties of the gate."""

import math
import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.data.statistics import (
    Clusters,
    clusters_needed,
    interval,
    margin_p_value,
    p_value,
    power,
    seed_band,
)
from tasks.gate.decision import decide
from tests.helpers.gate import PARAMS as SHIPPED
from tests.helpers.gate import unrelated

# One candidate, so that some of these are promoted.
PARAMS = SHIPPED.model_copy(update={"n_resamples": 1000, "min_items": 10, "nights": 1})
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=10, max_size=40)
# Right or wrong answers of the candidate and of the base, and the cluster of the item.
RELATED = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 25)), min_size=20, max_size=60)
Related = list[tuple[bool, bool, int]]


def rows(model: str, right: list[bool], clusters: list[str] | None = None) -> list[dict[str, Any]]:
    same = {"model": model, "slice": "s", "status": "ok", "answer": None}
    return [{"benchmark": "test", "item": "t", "score": 20.0, "tokens": 10, **same}] + [
        {
            "benchmark": "facts",
            "item": str(i),
            "score": float(ok),
            "cluster": clusters[i] if clusters else None,
            **same,
        }
        for i, ok in enumerate(right)
    ]


def judge(table: list[dict[str, Any]]) -> dict[str, Any]:
    return decide(table, {"base": None, "candidate": "c"}, [], PARAMS)


def verdict(candidate: list[bool], base: list[bool]) -> str:
    return str(judge(rows("candidate", candidate) + rows("base", base))["verdict"])


def related(items: Related, *, swap: bool = False, times: int = 1) -> list[dict[str, Any]]:
    """Return the scores of related items; with `times`, each is there so often, in its cluster."""
    items = items * times
    clusters = [str(cluster) for _, _, cluster in items]
    ours, theirs = ([one[side] for one in items] for side in ((1, 0) if swap else (0, 1)))
    return rows("candidate", ours, clusters) + rows("base", theirs, clusters)


@settings(max_examples=60, deadline=None)
@given(RELATED, st.integers(2, 4))
def test_copies_of_all_items_change_no_verdict(items: Related, times: int) -> None:
    once, more = judge(related(items)), judge(related(items, times=times))
    assert once["verdict"] == more["verdict"]
    assert once["gain"]["clusters"] == more["gain"]["clusters"]
    for figure in ("mean", "low", "high", "p_value", "p_value_of_loss", "power"):
        assert math.isclose(once["gain"][figure], more["gain"][figure], rel_tol=1e-5, abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(RELATED, st.randoms(use_true_random=False))
def test_the_order_of_the_items_changes_nothing(items: Related, chance: random.Random) -> None:
    table = related(items)
    expected = judge(table)
    chance.shuffle(table)
    assert judge(table) == expected


@settings(max_examples=60, deadline=None)
@given(RELATED)
def test_swapping_the_models_mirrors_the_gain(items: Related) -> None:
    here, there = judge(related(items)), judge(related(items, swap=True))
    mirrored = {"promote": "reject", "reject": "promote", "hold": "hold"}
    assert there["checks"][0]["verdict"] == mirrored[here["checks"][0]["verdict"]]
    assert there["gain"]["p_value"] == here["gain"]["p_value_of_loss"]


@settings(max_examples=60, deadline=None)
@given(RELATED, st.integers(2, 5))
def test_more_clusters_of_the_same_kind_never_lower_the_power(items: Related, times: int) -> None:
    more = [(a, b, cluster + 100 * copy) for copy in range(times) for a, b, cluster in items]
    assert judge(related(more))["gain"]["power"] >= judge(related(items))["gain"]["power"] - 1e-6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(1, 4)), min_size=2, max_size=60),
    st.floats(0.01, 0.5),
)
def test_a_larger_margin_is_easier_to_prove_and_no_loss_is_both_proven_and_excluded(
    found: list[tuple[float, int]], margin: float
) -> None:
    clusters = Clusters(np.array([d * n for d, n in found]), np.array([float(n) for _, n in found]))
    here = margin_p_value(clusters, margin)
    assert 0 <= here <= 1
    assert margin_p_value(clusters, margin + 0.1) <= here + 1e-9
    assert max(here, margin_p_value(clusters.swap(), -margin)) == 1


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


def alternating(items: int, spread: float) -> Clusters:
    """Return differences with this spread; their mean is 0 if their number is even."""
    return unrelated(np.resize([spread, -spread], items))


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
    assert power(unrelated(np.tile(found.sums, 2)), gain, alpha) >= here - 1e-12


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-12, 0.05), st.floats(0.5, 0.99))
def test_the_needed_items_have_the_power_and_fewer_do_not(gain: float, alpha: float, wanted: float) -> None:
    found = alternating(1000, 1.0)
    needed = clusters_needed(found, gain, alpha, wanted)
    assert math.isfinite(needed)
    if 10 < needed < 10**6:
        spread = found.sums.std(ddof=1)

        def reached(items: int) -> float:
            one = alternating(items, 1.0).sums
            return power(unrelated(one / one.std(ddof=1) * spread), gain, alpha)

        assert reached(int(needed)) >= wanted - 1e-9
        assert reached(int(needed) - 1) <= wanted + 1e-4


SCORES = st.lists(
    st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-1, 1)), min_size=2, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(SCORES, st.integers(1, 4000))
def test_every_statistic_of_finite_scores_is_finite(scores: list[float], nights: int) -> None:
    found = unrelated(scores)
    level = 0.05 / nights
    assert 0 <= p_value(found.sums, 1000, 0, level) <= 1
    assert 0 <= p_value(-found.sums, 1000, 0, level) <= 1
    assert 0 <= power(found, 0.1, level) <= 1
    assert 0 <= margin_p_value(found, 0.05) <= 1
    assert math.isfinite(seed_band(0.02, level))
    low, high = interval(found, 0.05, 1000, 0)
    assert -1 <= low <= high <= 1
