"""Score base, candidate and champion on the same items: data/sft, data/champion, benchmarks -> data/evaluate.

Benchmarks run through lm-eval (multiple choice by log-likelihood, chat template on); the held-out
split gives a token-weighted loss. Scores are kept per item, because the gate pairs them. They are
memoised by the content of model, items and code: a model that was scored before is not scored again.
"""

from typing import Annotated

from pydantic import Field

from tasks.config import StageParams


class EvaluateParams(StageParams):
    """How much to ask and how fast.

    Attributes:
        limit: Items of each benchmark, spread evenly over it; None asks all.
        batch_size: Sequences in one forward pass.
    """

    limit: Annotated[int, Field(strict=True, ge=1)] | None
    batch_size: Annotated[int, Field(strict=True, ge=1)]
