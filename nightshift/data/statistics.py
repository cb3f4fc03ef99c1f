"""Scores and the differences between two models: intervals, tests of pairs, and what they can show."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest, bootstrap, norm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from nightshift.data.benchmarks import HELDOUT

Differences = NDArray[np.float64]
Values = NDArray[np.float64]
Estimate = tuple[float, float, float]
Row = dict[str, Any]
Alternative = Literal["two-sided", "less"]
# Numbers that a resampling holds at a time: 8 MiB in double precision, however many items and resamples.
CHUNK = 2**20
# Resamples of an interval that lie beyond each of its ends, at least.
BEYOND = 10


class Resampling(Protocol):
    """How an interval is resampled; `tasks.gate.GateParams` says it for all of them."""

    @property
    def alpha(self) -> float:
        """Probability that the interval misses, 0 to 1."""

    @property
    def n_resamples(self) -> int:
        """Resamples, at least."""

    @property
    def seed(self) -> int:
        """Seed of the random numbers."""


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


def p_value(
    differences: Differences,
    n_resamples: int,
    seed: int,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
) -> float:
    """Return the probability of such a mean difference, or a larger one, between equal models.

    Right and wrong answers give McNemar's exact test: of the items on which the models differ, half should go
    either way. Other scores give Fisher's test of flipped signs: exact if there are no more ways to flip them
    than resamples, else see `flipped_tail`.

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        n_resamples: Resamples of flipped signs.
        seed: Seed of the resampling.
        alternative: two-sided, or less (the candidate is worse).
        alpha: What the result is compared with; the resamples are drawn where they can tell the two apart.

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
    # Flipped signs are symmetric: both tails are twice one of them, the lower one is the upper one mirrored.
    sides, observed = (2, abs(total)) if alternative == "two-sided" else (1, -total)
    # Equal sums may differ in their last digits by the order of their terms.
    reached = observed - 1e-12 * float(sizes.sum())
    if len(sizes) < n_resamples.bit_length():
        tail = float((all_flips(sizes) >= reached).mean())
    else:
        tail = flipped_tail(sizes, reached, alpha / sides, n_resamples, seed)
    return min(1.0, sides * tail)


def all_flips(sizes: Differences) -> Differences:
    """Return the sums of all ways to give signs to n sizes, shape (2**n,).

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

    Plain resampling never returns less than 1 / n_resamples, which a late look may no longer spend. Here half
    of the resamples prefer plus signs, so that their sums lie about where `alpha` ends, and every resample
    counts by its likelihood ratio: any tail is estimated, in the same time. The weight of what was observed
    counts too, by which a test that compares the result with a level errs no more often than that.

    Args:
        sizes: Sizes of the differences, all above 0, shape (n,).
        reached: Sum from which on a resample counts.
        alpha: Probability of the tail that should be estimated best.
        n_resamples: Resamples.
        seed: Seed of the resampling.

    Source: importance sampling with Harrison's correction, Biometrika 99 (2012) 57-69, theorem 1; a mixture
    with the plain distribution bounds the weights (Hesterberg, Technometrics 37 (1995) 185-194).
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
    """Divide resamples into chunks that fit into memory.

    Example:
        >>> list(chunks(10, CHUNK // 4))
        [4, 4, 2]
    """
    most = max(1, CHUNK // items)
    for done in range(0, n_resamples, most):
        yield min(most, n_resamples - done)


def interval(differences: Differences, alpha: float, n_resamples: int, seed: int) -> tuple[float, float]:
    """Return the two-sided interval of the mean by the bootstrap (BCa, Efron 1987).

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        alpha: Error probability.
        n_resamples: Resamples, at least; see `enough_resamples`.
        seed: Seed of the resampling.
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
    """Return the resamples of a two-sided interval, of which `BEYOND` lie beyond each of its ends.

    Example:
        >>> enough_resamples(10_000, 0.05), enough_resamples(10_000, 0.0001)
        (10000, 200000)
    """
    return max(n_resamples, math.ceil(2 * BEYOND / alpha))


def power(differences: Differences, gain: float, alpha: float) -> float:
    """Return the probability with which so many items show a gain, given how much the models differ.

    It is that of the paired t-test, to half a percentage point from 50 items on at an alpha of 0.0001. One
    item shows nothing; items that all differ by the same amount show everything.

    Args:
        differences: Candidate minus reference for each item, shape (n,).
        gain: Mean difference to be shown.
        alpha: Error probability of the two-sided test.

    Source: Guenther, The American Statistician 35 (1981) 243-244: a z-test of n - z**2 / 2 items has about
    the power of the t-test of n. The noncentral t of scipy and statsmodels is NaN for many inputs.
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
    """Return how many such items show a gain with a probability; see `power`.

    Returns:
        A whole number; infinity where it is larger than a float can be.
    """
    z = float(norm.isf(alpha / 2))
    ratio = max(z + float(norm.ppf(wanted)), 0.0) * float(differences.std(ddof=1)) / gain
    return float(np.ceil(ratio * ratio + z * z / 2))


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
    return float(norm.isf(alpha / 2)) * math.sqrt(2) * seed_noise


def estimate(rows: Sequence[Row], how: Resampling) -> Estimate:
    """Return the mean of scores, or the token-weighted loss, with its interval.

    Right and wrong answers give Wilson's interval, other scores the gate's bootstrap of the mean, losses the
    percentile bootstrap of their sum over the sum of tokens: examples are drawn with their tokens.
    """
    scores = np.array([row["score"] for row in rows])
    if rows[0]["benchmark"] == HELDOUT:
        return _token_mean(scores, np.array([row["tokens"] for row in rows]), how)
    if np.isin(scores, (0.0, 1.0)).all():
        low, high = proportion_confint(int(scores.sum()), len(scores), how.alpha, method="wilson")
        return float(scores.mean()), float(low), float(high)
    return float(scores.mean()), *interval(scores, how.alpha, how.n_resamples, how.seed)


def estimate_difference(pairs: Sequence[tuple[Row, Row]], how: Resampling) -> Estimate:
    """Return the mean difference of pairs with its interval; that of scores is the one of the gate."""
    found = np.array([ours["score"] - theirs["score"] for ours, theirs in pairs])
    if pairs[0][0]["benchmark"] == HELDOUT:
        return _token_mean(found, np.array([ours["tokens"] for ours, _ in pairs]), how)
    return float(found.mean()), *interval(found, how.alpha, how.n_resamples, how.seed)


def _token_mean(values: Values, tokens: NDArray[np.int64], how: Resampling) -> Estimate:
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
        # Of so many resamples at a time, each of which is as large as the data.
        batch=100,
        rng=np.random.default_rng(how.seed),
    ).confidence_interval
    return mean, float(low), float(high)


def is_broken(row: Row) -> bool:
    """Return whether a model was asked and gave no finite number."""
    if row["status"] == "ok":
        return row["score"] is None or not math.isfinite(row["score"])
    return bool(row["status"] == "error")
