"""Decide whether the candidate may replace the current model: data/evaluate -> data/gate.

Candidate and reference (the champion, or the base if there is none) answer the same items, so every test
is paired. Each check returns a verdict, and the most severe one counts:

- promote: all checks pass;
- hold: the data is inconclusive or too little, or the candidate is the champion;
- reject: the candidate is worse, or below a floor;
- error: scores, or figures computed from them for the decision, are missing or not finite, or the
  benchmark was trained on. Errors fail closed.

The gain is one of accuracy, the mean over the benchmarks that count, so that a large benchmark does not
hide a loss on a small one. With the objective `non_inferiority`, or without a benchmark that counts, it is
the reduction of the token-weighted loss: on the test examples that are newer than the champion, or on all.

Every night another candidate is tested, and each might seem better by chance. So each may spend
`alpha / nights`, the same on every night: then the probability that any of `nights` candidates is promoted
without being better is at most `alpha` (Bonferroni), whatever was promoted, rolled back or deleted before,
and however the candidates resemble each other.

Related items (see `cluster` of an item) count as one observation in every test. A benchmark must not fall
below the best champion so far, either; compared with the last champion only, it could fall a little with
each promotion.

Items that one of the two models cannot read are skipped for both; items that only the reference can read
hold the candidate. Losses are compared on the same texts, whatever the tokenizers. Other models in the
table, such as the baseline `retrieval`, are ignored.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nightshift.core.config import StageParams

Share = Annotated[float, Field(ge=0, le=1)]


class GateParams(StageParams):
    """Thresholds of the gate.

    Attributes:
        objective: superiority: better on the benchmarks. non_inferiority: not worse on the benchmarks, and a
            lower loss on the test examples that are newer than the champion.
        alpha: Significance level: probability of promoting a model that is no better, over `nights`
            candidates. Also the level of each test that a benchmark has not lost more than its margin.
        nights: Number of candidates for which `alpha` holds.
        detectable_gain: Accuracy gain, 0 to 1, that the benchmarks should be able to detect.
        detectable_loss_gain: The same for a gain on the test set, as a share of the reference's loss.
        power: Required probability of detecting it; below, a hold reports the number of items needed.
        margin: Tolerated accuracy loss, 0 to 1, on a benchmark or a slice.
        floors: Benchmark -> lowest accuracy, 0 to 1. Here and in the next two, benchmarks that were not
            scored are ignored, with a note in gate.json.
        retention: Benchmark of what the base can do -> tolerated accuracy loss against the base, 0 to 1.
        behaviour: Names of benchmarks that only guard: a gain does not count, and a loss rejects if it
            is significant and larger than the margin.
        seed_noise: Standard deviation of the accuracy over training runs that differ only in the seed.
        max_loss_increase: Tolerated relative increase of the held-out loss, if benchmarks count for the gain.
        min_items: Fewest paired items of a benchmark, or test examples, for a verdict other than hold;
            related items count as one.
        n_resamples: Resamples per confidence interval and per sign-flip test. An interval uses more if
            `alpha` requires it; the p-value of a test may be far below 1 / n_resamples.
        seed: Seed of the resampling.
    """

    objective: Literal["superiority", "non_inferiority"]
    # A smaller alpha would need more than 200,000 resamples per interval.
    alpha: Annotated[float, Field(ge=0.0001, le=0.5)]
    nights: Annotated[int, Field(strict=True, ge=1)]
    detectable_gain: Annotated[float, Field(gt=0, le=1)]
    detectable_loss_gain: Annotated[float, Field(gt=0, le=1)]
    power: Annotated[float, Field(gt=0, lt=1)]
    margin: Share
    floors: dict[str, Share]
    retention: dict[str, Share]
    behaviour: list[str]
    seed_noise: Annotated[float, Field(ge=0, le=1)]
    max_loss_increase: Share
    min_items: Annotated[int, Field(strict=True, ge=2)]
    n_resamples: Annotated[int, Field(strict=True, ge=1000)]
    seed: Annotated[int, Field(strict=True, ge=0)]

    @property
    def level(self) -> float:
        """Significance level of the gain of one candidate."""
        return self.alpha / self.nights

    @property
    def judges_new(self) -> bool:
        """Whether the gain is one of the loss on the test examples that are newer than the champion."""
        return self.objective == "non_inferiority"

    @model_validator(mode="after")
    def _each_benchmark_has_one_use(self) -> "GateParams":
        if both := sorted(set(self.retention) & set(self.behaviour)):
            raise ValueError(f"{both[0]} is listed in both gate.retention and gate.behaviour; choose one")
        return self
