"""Scores and paired comparison of two models: confidence intervals, paired tests, power."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest, bootstrap, norm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score

Differences = NDArray[np.float64]
Values = NDArray[np.float64]
Estimate = tuple[float, float, float]
Alternative = Literal["two-sided", "less"]
# Numbers in memory while resampling: 8 MiB in double precision, for any number of items and resamples.
CHUNK = 2**20
# Minimum number of resamples beyond each end of an interval.
BEYOND = 10


class Resampling(Protocol):
    """Bootstrap settings of confidence intervals, provided by `tasks.gate.GateParams`."""

    @property
    def alpha(self) -> float:
        """Probability that the interval misses the true value, 0 to 1."""

    @property
    def n_resamples(self) -> int:
        """Minimum number of resamples."""

    @property
    def seed(self) -> int:
        """Random seed."""


def spent_alpha(alpha: float, look: int) -> float:
    """Return the alpha that one look may spend; over all looks the values sum to `alpha`.

    Args:
        alpha: Significance level over all looks.
        look: Number of this look, from 1.

    Example:
        >>> round(spent_alpha(0.05, 1), 4), round(sum(spent_alpha(0.05, k) for k in range(1, 10**5)), 4)
        (0.0304, 0.05)
    """
    return alpha * 6 / (math.pi * look) ** 2


def p_value(
    differences: Differences,
    n_resamples: int,
    seed: int,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
) -> float:
    """Return the p-value of the paired test for no difference between two models.

    Right and wrong answers use McNemar's exact test: of the items on which the models differ, half
    should favor either model. Other scores use Fisher's sign-flip test: exact if there are no more sign
    combinations than resamples, otherwise see `flipped_tail`.

    Differences of summed losses give the test of the token-weighted loss: flipping signs changes the sum of
    the differences, but not the sum of tokens that it is divided by.

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        n_resamples: Number of sign-flip resamples.
        seed: Random seed.
        alternative: two-sided, or less (the candidate is worse).
        alpha: Significance level that the p-value is compared with; resampling is most accurate near it.

    Example:
        >>> p_value(np.array([1.0] * 8 + [-1.0, 0.0]), 1000, 0)
        0.0390625
    """
    if not np.isfinite(differences).all():
        return math.nan
    if not np.any(differences):
        return 1.0
    if np.all(np.isin(differences, (-1.0, 0.0, 1.0))):
        wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
        return float(binomtest(wins, wins + losses, alternative=alternative).pvalue)
    scaled = differences[differences != 0] / np.abs(differences).max()
    sizes, total = np.abs(scaled), float(scaled.sum())
    # The distribution is symmetric: both tails are twice one tail; the lower mirrors the upper one.
    sides, observed = (2, abs(total)) if alternative == "two-sided" else (1, -total)
    # Equal sums may differ in the last digits, depending on the order of summation.
    reached = observed - 1e-12 * float(sizes.sum())
    if len(sizes) < n_resamples.bit_length():
        tail = float((all_flips(sizes) >= reached).mean())
    else:
        tail = flipped_tail(sizes, reached, alpha / sides, n_resamples, seed)
    return min(1.0, sides * tail)


def all_flips(sizes: Differences) -> Differences:
    """Return the sums over all sign combinations of n sizes, shape (2**n,).

    Example:
        >>> all_flips(np.array([1.0, 3.0])).tolist()
        [4.0, 2.0, -2.0, -4.0]
    """
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums + size, sums - size])
    return sums


def flipped_tail(sizes: Differences, reached: float, alpha: float, n_resamples: int, seed: int) -> float:
    """Return the probability that sizes with random signs have a sum of at least `reached`.

    Plain resampling never returns less than 1 / n_resamples, which can exceed the alpha left for a late
    look. Here half of the resamples favor plus signs, so that their sums lie near the `alpha` quantile,
    and each resample is weighted by its likelihood ratio. This estimates any tail in the same time. The
    weight of the observed sum counts too, so a test against a significance level keeps its error rate.

    Args:
        sizes: Absolute differences, all above 0, shape (n,).
        reached: Smallest sum that counts.
        alpha: Tail probability to estimate most accurately.
        n_resamples: Number of resamples.
        seed: Random seed.

    Source: importance sampling with Harrison's correction, Biometrika 99 (2012) 57-69, theorem 1; a
    mixture with the plain distribution bounds the weights (Hesterberg, Technometrics 37 (1995) 185-194).
    """
    tilt = float(norm.isf(alpha)) / float(np.linalg.norm(sizes))
    # Logarithm of the mean of exp(tilt * sum) under random signs.
    scale = float((np.logaddexp(tilt * sizes, -tilt * sizes) - math.log(2)).sum())
    chance = np.random.default_rng(seed)
    weight = 2 * float(expit(scale - tilt * reached))
    for count in chunks(n_resamples, len(sizes)):
        is_tilted = chance.random((count, 1)) < 0.5
        is_plus = chance.random((count, len(sizes))) < np.where(is_tilted, expit(2 * tilt * sizes), 0.5)
        sums = np.where(is_plus, sizes, -sizes).sum(axis=1)
        weight += float((2 * expit(scale - tilt * sums))[sums >= reached].sum())
    return weight / (n_resamples + 1)


def chunks(n_resamples: int, items: int) -> Iterator[int]:
    """Split resamples into chunks that fit into memory.

    Example:
        >>> list(chunks(10, CHUNK // 4))
        [4, 4, 2]
    """
    most = max(1, CHUNK // items)
    for done in range(0, n_resamples, most):
        yield min(most, n_resamples - done)


def interval(differences: Differences, alpha: float, n_resamples: int, seed: int) -> tuple[float, float]:
    """Return the two-sided bootstrap confidence interval of the mean (BCa, Efron 1987).

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        alpha: Significance level.
        n_resamples: Minimum number of resamples; see `enough_resamples`.
        seed: Random seed.
    """
    scale = float(np.abs(differences).max())
    # Differences that are equal up to rounding have no spread to resample.
    if np.ptp(differences) <= 1e-9 * scale:
        return float(differences.min()), float(differences.max())
    low, high = bootstrap(
        (differences / scale,),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=enough_resamples(n_resamples, alpha),
        batch=max(1, CHUNK // len(differences)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low) * scale, float(high) * scale


def enough_resamples(n_resamples: int, alpha: float) -> int:
    """Return the number of resamples that puts `BEYOND` of them beyond each end of a two-sided interval.

    Example:
        >>> enough_resamples(10_000, 0.05), enough_resamples(10_000, 0.0001)
        (10000, 200000)
    """
    return max(n_resamples, math.ceil(2 * BEYOND / alpha))


def power(differences: Differences, gain: float, alpha: float) -> float:
    """Return the power to detect a gain with this many items and this spread of differences.

    It matches the paired t-test to half a percentage point from 50 items on at an alpha of 0.0001. With
    one item the power is 0; with items that all differ by the same amount it is 1.

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        gain: Mean difference to detect.
        alpha: Significance level of the two-sided test.

    Source: Guenther, The American Statistician 35 (1981) 243-244: a z-test of n - z**2 / 2 items has
    about the power of the t-test of n. The noncentral t of scipy and statsmodels is NaN for many inputs.
    """
    if len(differences) < 2:
        return 0.0
    spread = float(differences.std(ddof=1))
    if spread == 0:
        return 1.0
    z = float(norm.isf(alpha / 2))
    shift = gain / spread * math.sqrt(max(len(differences) - z * z / 2, 0.0))
    return float(norm.sf(z - shift) + norm.sf(z + shift))


def items_needed(differences: Differences, gain: float, alpha: float, wanted: float) -> float:
    """Return the number of such items needed to detect a gain with power `wanted`; see `power`.

    Returns:
        A whole number; infinity if it exceeds the range of a float, with a gain of 0, and with fewer than two
        differences, which have no spread.
    """
    if gain == 0 or len(differences) < 2:
        return math.inf
    z = float(norm.isf(alpha / 2))
    ratio = max(z + float(norm.ppf(wanted)), 0.0) * float(differences.std(ddof=1)) / gain
    return float(np.ceil(ratio * ratio + z * z / 2))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which of several tests are significant together (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.5], 0.05)
        [True, False, False]
    """
    return [bool(one) for one in multipletests(list(p_values), alpha, method="holm")[0]]


def seed_band(seed_noise: float, alpha: float) -> float:
    """Return the score difference that two training runs of one recipe reach by seed alone.

    Args:
        seed_noise: Standard deviation of the score between such training runs.
        alpha: Probability that they differ by more.

    Example:
        >>> round(seed_band(0.01, 0.05), 4)
        0.0277
    """
    return float(norm.isf(alpha / 2)) * math.sqrt(2) * seed_noise


def estimate(rows: Sequence[Score], how: Resampling) -> Estimate:
    """Return the mean score, or the token-weighted loss, with its confidence interval.

    Right and wrong answers use Wilson's interval, other scores the gate's bootstrap of the mean. Losses
    use the percentile bootstrap of sum over sum of tokens: examples are drawn with their tokens.
    """
    scores = np.array([row["score"] for row in rows])
    if rows[0]["benchmark"] == HELDOUT:
        return token_mean(scores, np.array([row["tokens"] for row in rows]), how)
    if np.isin(scores, (0.0, 1.0)).all():
        low, high = proportion_confint(int(scores.sum()), len(scores), how.alpha, method="wilson")
        return float(scores.mean()), float(low), float(high)
    return float(scores.mean()), *interval(scores, how.alpha, how.n_resamples, how.seed)


def estimate_difference(pairs: Sequence[tuple[Score, Score]], how: Resampling) -> Estimate:
    """Return the mean difference of pairs with its interval; for scores it is the gate's interval."""
    found = np.array([ours["score"] - theirs["score"] for ours, theirs in pairs])
    if pairs[0][0]["benchmark"] == HELDOUT:
        return token_mean(found, np.array([ours["tokens"] for ours, _ in pairs]), how)
    return float(found.mean()), *interval(found, how.alpha, how.n_resamples, how.seed)


def token_mean(values: Values, tokens: NDArray[np.int64], how: Resampling) -> Estimate:
    """Return the sum of values over the sum of tokens, in nats per token, with its interval."""
    mean = float(values.sum() / tokens.sum())
    if len(values) == 1:
        return mean, np.nan, np.nan
    low, high = bootstrap(
        (values, tokens),
        lambda v, t, axis: v.sum(axis) / t.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=1 - how.alpha,
        n_resamples=enough_resamples(how.n_resamples, how.alpha),
        # Number of resamples at a time; each is as large as the data.
        batch=100,
        rng=np.random.default_rng(how.seed),
    ).confidence_interval
    return mean, float(low), float(high)


def is_broken(row: Score) -> bool:
    """Return whether a model was evaluated on an item without giving a finite score."""
    if row["status"] == "ok":
        return row["score"] is None or not math.isfinite(row["score"])
    return bool(row["status"] == "error")
