"""Tests of paired scores: scipy's and statsmodels', on the differences between two models."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, norm, permutation_test
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

Differences = NDArray[np.float64]


def spent_alpha(alpha: float, look: int) -> float:
    """Return the error probability that a look may spend; over all looks they sum to alpha.

    Args:
        alpha: Of all looks together.
        look: Number of this one, from 1.

    Example:
        >>> round(spent_alpha(0.05, 1), 4), round(sum(spent_alpha(0.05, k) for k in range(1, 10**5)), 4)
        (0.0304, 0.05)
    """
    return alpha * 6 / (math.pi * look) ** 2


def p_value(differences: Differences, n_resamples: int, seed: int, alternative: str = "two-sided") -> float:
    """Return the probability of such a mean difference, or a larger one, between equal models.

    Right and wrong answers give McNemar's exact test: of the items on which the models differ, half should go
    either way. Other scores give Fisher's test of flipped signs, which never says less than 1 / resamples.

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        n_resamples: Of the permutation test.
        seed: Of the permutation test.
        alternative: two-sided, less (the candidate is worse) or greater.

    Example:
        >>> p_value(np.array([1.0] * 8 + [-1.0, 0.0]), 1000, 0)
        0.0390625
    """
    if not np.any(differences):
        return 1.0
    if np.all(np.isin(differences, (-1.0, 0.0, 1.0))):
        wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
        return float(binomtest(wins, wins + losses, alternative=alternative).pvalue)
    result = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=n_resamples,
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def interval(differences: Differences, alpha: float, n_resamples: int, seed: int) -> tuple[float, float]:
    """Return the two-sided interval of the mean by the bootstrap (BCa, Efron 1987).

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        alpha: Error probability.
        n_resamples: Resamples.
        seed: Of the resampling.
    """
    mean = float(differences.mean())
    # Equal differences have no spread to resample.
    if differences.std() == 0:
        return mean, mean
    low, high = bootstrap(
        (differences,),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def power(differences: Differences, gain: float, alpha: float) -> float:
    """Return the probability with which so many items show a gain, given how much the models differ.

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        gain: Mean difference to be shown.
        alpha: Error probability of the two-sided test.
    """
    spread = float(differences.std(ddof=1))
    if spread == 0:
        return 1.0
    return float(TTestPower().power(effect_size=gain / spread, nobs=len(differences), alpha=alpha))


def items_needed(differences: Differences, gain: float, alpha: float, wanted: float) -> int:
    """Return how many such items show a gain with a probability; see `power`."""
    spread = float(differences.std(ddof=1))
    solved = TTestPower().solve_power(effect_size=gain / spread, alpha=alpha, power=wanted)
    return math.ceil(float(np.squeeze(solved)))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Tell which of several tests hold together (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.5], 0.05)
        [True, False, False]
    """
    return [bool(one) for one in multipletests(list(p_values), alpha, method="holm")[0]]


def seed_band(seed_noise: float, alpha: float) -> float:
    """Return the difference that two trainings of one recipe reach by their seeds alone.

    Args:
        seed_noise: Standard deviation of the score between such trainings.
        alpha: Probability with which they differ by more.

    Example:
        >>> round(seed_band(0.01, 0.05), 4)
        0.0277
    """
    return float(norm.ppf(1 - alpha / 2)) * math.sqrt(2) * seed_noise
