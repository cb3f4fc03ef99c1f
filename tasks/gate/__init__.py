"""Decide whether the candidate may replace the current model: data/evaluate -> data/gate.

Candidate and reference (the champion, or the base if there is none) answer the same items, so every test
is paired. Each check returns a verdict, and the most severe one counts:

- promote: all checks pass;
- hold: the data is inconclusive or too little, or the candidate is the champion;
- reject: the candidate is worse, or below a floor;
- error: scores, or figures computed from them for the decision, are missing or not finite, or the
  benchmark was trained on. Errors fail closed.

The gain is one of accuracy on benchmarks. Without a benchmark that counts, it is the reduction of the
token-weighted loss on the test set, in the same paired test: over examples, with the same alpha.

Items that one of the two models cannot read are skipped for both; items that only the reference can read
hold the candidate. Losses are compared on the same texts, whatever the tokenizers. Other models in the
table, such as the baseline `retrieval`, are ignored.

Every look at another candidate since the last promotion makes chance gains likelier, so the k-th look
spends alpha * 6 / (pi k)^2 of the significance level, which sums to alpha over all looks.
"""

from typing import Annotated

from pydantic import Field, model_validator

from nightshift.core.config import StageParams

Share = Annotated[float, Field(ge=0, le=1)]


class GateParams(StageParams):
    """Thresholds of the gate.

    Attributes:
        alpha: Significance level: probability of promoting a model that is no better, over all looks
            since the last promotion.
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
        min_items: Fewest paired items of a benchmark, or test examples, for a verdict other than hold.
        n_resamples: Resamples per confidence interval and per sign-flip test. An interval uses more if
            `alpha` requires it; the p-value of a test may be far below 1 / n_resamples.
        seed: Seed of the resampling.
    """

    # A smaller alpha would need more than 200,000 resamples per interval.
    alpha: Annotated[float, Field(ge=0.0001, le=0.5)]
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

    @model_validator(mode="after")
    def _each_benchmark_has_one_use(self) -> "GateParams":
        if both := sorted(set(self.retention) & set(self.behaviour)):
            raise ValueError(f"{both[0]} is listed in both gate.retention and gate.behaviour; choose one")
        return self
