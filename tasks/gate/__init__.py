"""Decide whether the candidate may replace what runs now: data/evaluate -> data/gate.

The same items are answered by the candidate and by its reference (the champion, or the base if there is
none), so every test is paired. Each check reaches a verdict, and the gravest of them counts:

- promote: nothing speaks against it;
- hold: the data cannot tell, or the candidate is the champion;
- reject: the candidate is worse, or below a floor;
- error: scores, or what is computed from them to decide, are missing or not finite numbers, or the benchmark
  was trained on. Errors fail closed.

Items that one of the two cannot read are skipped for both; those that the reference alone can read hold the
candidate. Losses are compared on the same texts, whatever the tokenizers. Other models in the table, such as
the baseline `retrieval`, take no part.

Every look at another candidate since the last promotion makes chance gains likelier, so the k-th look spends
alpha * 6 / (pi k)^2 of the error probability, which sums to alpha over all looks.
"""

from typing import Annotated

from pydantic import Field, model_validator

from nightshift.core.config import StageParams

Share = Annotated[float, Field(ge=0, le=1)]


class GateParams(StageParams):
    """How sure the gate must be.

    Attributes:
        alpha: Probability of promoting a model that is no better, over all looks since the last promotion.
        detectable_gain: Gain of accuracy, 0 to 1, that the benchmarks should be able to show.
        power: Probability with which they should show it; below, a verdict of hold names the items needed.
        margin: Loss of accuracy, 0 to 1, that counts as none on a benchmark or a slice.
        floors: Lowest accuracy, 0 to 1, of a benchmark, by its name.
        retention: Benchmarks of what the base could do before, by name, and the loss of accuracy, 0 to 1,
            against the base that is accepted.
        behaviour: Benchmarks that only guard, by name: a gain there counts for nothing, and a loss rejects
            when it is significant and larger than the margin.
        seed_noise: Standard deviation of the accuracy between trainings that differ in their seed only.
        max_loss_increase: Accepted relative growth of the held-out loss.
        min_items: Fewest paired items of a benchmark for a verdict.
        n_resamples: Resamples of each interval and each test of flipped signs; an interval takes more where
            `alpha` asks for them, a test's p may be far below 1 / n_resamples.
        seed: Seed of the resampling.
    """

    # An interval of a smaller one would take more than 200,000 resamples.
    alpha: Annotated[float, Field(ge=0.0001, le=0.5)]
    detectable_gain: Annotated[float, Field(gt=0, le=1)]
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
            raise ValueError(f"{both[0]} stands under retention and under behaviour; choose one")
        return self
