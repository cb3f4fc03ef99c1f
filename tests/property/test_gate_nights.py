"""A thousand simulated nights: how often chance is promoted, and how often a real gain."""

import numpy as np

from nightshift.data.statistics import p_value, power, spent_alpha

ITEMS, ALPHA = 180, 0.05


def promoted(chance: np.random.Generator, gain: float, look: int) -> bool:
    """Return whether a candidate is promoted that differs on 30% of the items and has this mean gain."""
    won, lost = 0.15 + gain / 2, 0.15 - gain / 2
    differences = chance.choice([1.0, -1.0, 0.0], size=ITEMS, p=[won, lost, 0.7])
    return bool(p_value(differences, 1000, 0) <= spent_alpha(ALPHA, look) and differences.mean() > 0)


def test_the_rate_of_false_promotions_over_many_looks_is_below_alpha() -> None:
    chance = np.random.default_rng(0)
    stretches = [any(promoted(chance, 0.0, look) for look in range(1, 21)) for _ in range(400)]
    # The tests are two-sided: the other half of alpha would be spent on losses.
    assert sum(stretches) / 400 < ALPHA / 2
    # Without correction, chance would be promoted in a fifth of the series.
    uncorrected = [any(promoted(chance, 0.0, 1) for _ in range(20)) for _ in range(100)]
    assert sum(uncorrected) / 100 > 0.15


def test_a_thousand_nights_without_a_gain_promote_nothing() -> None:
    chance = np.random.default_rng(1)
    assert not any(promoted(chance, 0.0, look) for look in range(1, 1001))


def test_a_real_gain_is_promoted_at_the_rate_that_the_power_predicts() -> None:
    chance = np.random.default_rng(2)
    found = [promoted(chance, 0.1, 1) for _ in range(1000)]
    differences = chance.choice([1.0, -1.0, 0.0], size=100_000, p=[0.2, 0.1, 0.7])[:ITEMS]
    expected = power(differences, 0.1, spent_alpha(ALPHA, 1))
    # McNemar's exact test is slightly stricter than the t-test that estimates the power.
    assert expected - 0.12 < sum(found) / 1000 < expected + 0.05
