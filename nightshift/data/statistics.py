"""Scores and paired comparison of two models: confidence intervals, paired tests, power."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom, bootstrap, norm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score

Values = NDArray[np.float64]
Estimate = tuple[float, float, float]
# Numbers in memory while resampling: 8 MiB in double precision, for any number of items and resamples.
CHUNK = 2**20
# Minimum number of resamples beyond each end of an interval.
BEYOND = 10
# Sum of whole numbers up to which the distribution of their signed sum is computed exactly, in a second.
MOST_EXACT = 20_000


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


@dataclass(frozen=True, slots=True)
class Clusters:
    """Differences of two models' scores, summed over clusters: related items, or related examples.

    Items of a cluster ask for the same fact or share a document, so the models win or lose them together.
    Tests, intervals and power therefore treat a cluster as one observation.

    Attributes:
        sums: Candidate minus reference, summed over each cluster, shape (n_clusters,).
        sizes: Number of items of each cluster, or of tokens, shape (n_clusters,).
    """

    sums: Values
    sizes: Values

    @property
    def mean(self) -> float:
        """Mean difference per item, or per token."""
        return float(self.sums.sum() / self.sizes.sum())

    def swap(self) -> "Clusters":
        """Return the differences with the models swapped."""
        return Clusters(-self.sums, self.sizes)


def cluster(pairs: Sequence[tuple[Score, Score]], weights: Mapping[str, float] | None = None) -> Clusters:
    """Sum the differences of pairs of scores over their clusters, in order of the clusters' names.

    Args:
        pairs: Scores of the candidate and its reference. Losses count per token of the candidate.
        weights: Benchmark -> weight of each of its items; 1 by default.
    """
    names, where = np.unique([cluster_of(ours) for ours, _ in pairs], return_inverse=True)
    weight = np.array([(weights or {}).get(ours["benchmark"], 1.0) for ours, _ in pairs], dtype=np.float64)
    found = np.array([ours["score"] - theirs["score"] for ours, theirs in pairs], dtype=np.float64)
    sizes = np.array([ours["tokens"] if ours["benchmark"] == HELDOUT else 1 for ours, _ in pairs])
    sums, totals = np.zeros(len(names)), np.zeros(len(names))
    np.add.at(sums, where, weight * found)
    np.add.at(totals, where, weight * sizes)
    return Clusters(sums, totals)


def cluster_of(row: Score) -> str:
    """Return the cluster of a score; an item without one is a cluster of its own."""
    return row.get("cluster") or f"{row['benchmark']}/{row['item']}"


def p_value(sums: Values, n_resamples: int, seed: int, alpha: float = 0.05) -> float:
    """Return the p-value of the one-sided paired test that the candidate is no better than the reference.

    Fisher's sign-flip test over clusters: if the models are equally good, each cluster's sum is as likely to
    be positive as negative. It is exact for whole numbers, such as counts of right answers, and for few
    clusters; with one item per cluster it is McNemar's exact test. Otherwise see `flipped_tail`.

    Sums of losses give the test of the token-weighted loss: flipping signs changes the sum of the
    differences, but not the sum of tokens that it is divided by.

    Args:
        sums: Candidate minus reference, summed over each cluster, shape (n_clusters,).
        n_resamples: Number of sign-flip resamples.
        seed: Random seed.
        alpha: Significance level that the p-value is compared with; resampling is most accurate near it.

    Example:
        >>> round(p_value(np.array([1.0] * 8 + [-1.0, 0.0]), 1000, 0), 6)
        0.019531
    """
    if not np.isfinite(sums).all():
        return math.nan
    found = sums[sums != 0]
    if not len(found):
        return 1.0
    sizes, total = np.abs(found), float(found.sum())
    if np.all(sizes == np.rint(sizes)) and sizes.sum() <= MOST_EXACT:
        return whole_tail(sizes.astype(np.int64), round(total))
    scaled, total = sizes / sizes.max(), float((found / sizes.max()).sum())
    # Equal sums may differ in the last digits, depending on the order of summation.
    reached = total - 1e-12 * float(scaled.sum())
    if len(scaled) < n_resamples.bit_length():
        return float((all_flips(scaled) >= reached).mean())
    return min(1.0, flipped_tail(scaled, reached, alpha, n_resamples, seed))


def whole_tail(sizes: NDArray[np.int64], reached: int) -> float:
    """Return the probability that whole numbers with random signs have a sum of at least `reached`.

    Example:
        >>> round(whole_tail(np.array([1, 1, 1]), 3), 6), round(whole_tail(np.array([2, 1]), 1), 6)
        (0.125, 0.5)
    """
    # Probability of each sum of the numbers with a plus sign. Clusters of one size form a binomial.
    chances = np.ones(1)
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, of_size)
    # The sum is the numbers with a plus sign, minus the others.
    fewest = -(-(reached + int(sizes.sum())) // 2)
    return min(1.0, float(chances[max(0, fewest) :].sum()))


def all_flips(sizes: Values) -> Values:
    """Return the sums over all sign combinations of n sizes, shape (2**n,).

    Example:
        >>> all_flips(np.array([1.0, 3.0])).tolist()
        [4.0, 2.0, -2.0, -4.0]
    """
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums + size, sums - size])
    return sums


def flipped_tail(sizes: Values, reached: float, alpha: float, n_resamples: int, seed: int) -> float:
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


def margin_p_value(found: Clusters, margin: float) -> float:
    """Return the p-value of the one-sided test that the loss of accuracy is at least a margin.

    Tango's score test for the difference of paired proportions, for clusters and for graded scores between
    0 and 1. The variance is that of the likeliest distribution in which the loss is the margin. So a
    benchmark that is too small to show such a loss proves nothing, even if no answer changed.

    Args:
        found: Candidate minus reference.
        margin: Loss of accuracy, 0 to 1; negative for the test that the gain is at most `-margin`.

    Source: Tango, Statistics in Medicine 17 (1998) 891-908. That distribution is the nonparametric maximum
    likelihood estimate for a bounded mean (Honda and Takemura, COLT 2010; KL_inf in the bandit literature).

    Example:
        >>> one_lost_of_44 = Clusters(np.array([-1.0] + [0.0] * 43), np.ones(44))
        >>> round(margin_p_value(one_lost_of_44, 0.1), 3)
        0.044
    """
    lowest = (1 - margin) * float(found.sizes.max())
    if not np.isfinite(found.sums).all():
        return math.nan
    if lowest <= 0:
        return 0.0
    # -1 to the largest possible gain: the excess over the margin, in units of its largest possible shortfall.
    values = (found.sums + margin * found.sizes) / lowest
    mean = float(values.mean())
    if mean <= 0:
        return 1.0

    def slope(tilt: float) -> float:
        return float((values / (1 + tilt * values)).mean())

    most = 1 - 1e-9
    tilt = brentq(slope, 0.0, most) if slope(most) < 0 else 1.0
    chances = 1 / (1 + tilt * values) / len(values)
    # What is left of the probability lies on the largest shortfall, which need not have been observed.
    variance = float((chances * values**2).sum()) + max(0.0, 1 - float(chances.sum()))
    return float(norm.sf(mean * math.sqrt(len(values) / variance)))


def interval(
    found: Clusters, alpha: float, n_resamples: int, seed: int, method: Literal["BCa", "percentile"] = "BCa"
) -> tuple[float, float]:
    """Return the two-sided bootstrap confidence interval of the mean; clusters are drawn as a whole.

    Args:
        found: Candidate minus reference.
        alpha: Significance level.
        n_resamples: Minimum number of resamples; see `enough_resamples`.
        seed: Random seed.
        method: BCa (Efron 1987); percentile takes less time for many thousand clusters.
    """
    means = found.sums / found.sizes
    scale = float(np.abs(means).max())
    # Means that are equal up to rounding have no spread to resample.
    if np.ptp(means) <= 1e-9 * scale:
        return float(means.min()), float(means.max())
    sums, sizes = found.sums / scale, found.sizes

    def ratio(drawn: NDArray[np.intp], axis: int) -> Values:
        total: Values = sums[drawn].sum(axis) / sizes[drawn].sum(axis)
        return total

    low, high = bootstrap(
        (np.arange(len(sums)),),
        ratio,
        method=method,
        vectorized=True,
        confidence_level=1 - alpha,
        n_resamples=enough_resamples(n_resamples, alpha),
        batch=max(1, CHUNK // len(sums)),
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


def power(found: Clusters, gain: float, alpha: float) -> float:
    """Return the power to detect a gain with this many clusters and this spread of differences.

    It matches the one-sided paired t-test to half a percentage point from 50 clusters on at an alpha of
    0.0001. With one cluster the power is 0; with clusters that all differ by the same amount it is 1.

    Args:
        found: Candidate minus reference.
        gain: Mean difference to detect.
        alpha: Significance level of the one-sided test.

    Source: Guenther, The American Statistician 35 (1981) 243-244: a z-test of n - z**2 / 2 items has
    about the power of the t-test of n. The noncentral t of scipy and statsmodels is NaN for many inputs.
    """
    if len(found.sums) < 2:
        return 0.0
    deviation = spread(found, gain)
    if deviation == 0:
        return 1.0
    z = float(norm.isf(alpha))
    return float(norm.sf(z - gain / deviation * math.sqrt(max(len(found.sums) - z * z / 2, 0.0))))


def clusters_needed(found: Clusters, gain: float, alpha: float, wanted: float) -> float:
    """Return the number of such clusters needed to detect a gain with power `wanted`; see `power`.

    Returns:
        A whole number; infinity if it exceeds the range of a float, with a gain of 0, and with fewer than two
        clusters, which have no spread.
    """
    if gain == 0 or len(found.sums) < 2:
        return math.inf
    z = float(norm.isf(alpha))
    ratio = max(z + float(norm.ppf(wanted)), 0.0) * spread(found, gain) / gain
    return float(np.ceil(ratio * ratio + z * z / 2))


def spread(found: Clusters, gain: float) -> float:
    """Return the standard deviation of the clusters' sums if the mean were `gain`, per mean size."""
    sums = found.sums - (found.mean - gain) * found.sizes
    return float((sums / found.sizes.mean()).std(ddof=1))


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

    Right and wrong answers to unrelated items use Wilson's interval, other scores the bootstrap of the mean
    over clusters, as the gate.
    """
    scores = np.array([row["score"] for row in rows])
    is_related = len({cluster_of(row) for row in rows}) < len(rows)
    if rows[0]["benchmark"] != HELDOUT and not is_related and np.isin(scores, (0.0, 1.0)).all():
        low, high = proportion_confint(int(scores.sum()), len(scores), how.alpha, method="wilson")
        return float(scores.mean()), float(low), float(high)
    nothing: list[Score] = [{**row, "score": 0.0} for row in rows]
    return estimate_difference(list(zip(rows, nothing, strict=True)), how)


def estimate_difference(pairs: Sequence[tuple[Score, Score]], how: Resampling) -> Estimate:
    """Return the mean difference of pairs, or that of the losses per token, with the gate's interval."""
    return estimate_mean(cluster(pairs), how, is_loss=pairs[0][0]["benchmark"] == HELDOUT)


def estimate_mean(found: Clusters, how: Resampling, *, is_loss: bool) -> Estimate:
    """Return the mean difference with its confidence interval; NaN for the interval of a single loss."""
    if is_loss and len(found.sums) == 1:
        return found.mean, math.nan, math.nan
    method: Literal["BCa", "percentile"] = "percentile" if is_loss else "BCa"
    return found.mean, *interval(found, how.alpha, how.n_resamples, how.seed, method)


def is_broken(row: Score) -> bool:
    """Return whether a model was evaluated on an item without giving a finite score."""
    if row["status"] == "ok":
        return row["score"] is None or not math.isfinite(row["score"])
    return bool(row["status"] == "error")
