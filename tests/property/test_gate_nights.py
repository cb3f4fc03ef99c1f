"""Simulated years of nights: how often chance is promoted, a real gain, and a slow loss.

`python -m benchmarks.gate` runs the same simulation with more series.
"""

import numpy as np
import pytest

from benchmarks.gate import (
    CLUSTER_SIZES,
    ITEMS,
    PARAMS,
    RULES,
    START,
    draw,
    promoted_by_night,
    promoted_on_night,
    rot,
)
from nightshift.data.statistics import power
from tests.helpers.gate import unrelated


@pytest.mark.parametrize("size", CLUSTER_SIZES)
def test_a_year_without_a_gain_promotes_nothing_more_often_than_alpha(size: int) -> None:
    by_night = promoted_by_night(RULES["gate"], 0.0, size, series=400)
    # The standard deviation of a share of 0.05 is 0.011.
    assert by_night[365] <= PARAMS.alpha + 0.02
    assert by_night[1] <= by_night[365]


def test_related_items_that_are_tested_one_by_one_promote_chance() -> None:
    # What the gate did before it knew clusters: 0.05 was promised.
    assert promoted_by_night(RULES["alpha spending"], 0.0, 4, series=100)[30] > 0.3


def test_the_power_is_the_same_on_every_night_and_as_predicted() -> None:
    found = promoted_on_night(RULES["gate"], 0.1, 1, 640, series=1000)
    assert len(set(found.values())) == 1
    spending = promoted_on_night(RULES["alpha spending"], 0.1, 1, ITEMS, series=300)
    assert spending[30] < 0.2 * spending[1]
    one = draw(0.1, 1, 640, 1)[0]
    differences = np.repeat([1.0, -1.0, 0.0], [one.won, one.lost, one.items - one.won - one.lost])
    # McNemar's exact test is slightly stricter than the t-test that estimates the power.
    assert found[1] == pytest.approx(power(unrelated(differences), 0.1, PARAMS.level), abs=0.12)


def test_a_benchmark_that_loses_a_little_with_each_promotion_stops_at_the_margin() -> None:
    lowest = {
        rule: min(rot(rule, "slow rot", seed)[-1] for seed in range(3)) for rule in ("alpha spending", "gate")
    }
    assert lowest["gate"] >= START - PARAMS.margin - 0.02
    assert lowest["alpha spending"] < START - 3 * PARAMS.margin
