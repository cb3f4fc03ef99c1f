"""Score base, candidate and champion: data/sft, data/champion, benchmarks -> data/evaluate.

All models answer the same items. Benchmarks (`nightshift.data.benchmarks`) are multiple choice,
generation, invariance or direction; the test set gives a token-weighted loss. Scores are stored per
item, because the gate pairs them. They are cached by the content of model, benchmark and code: nothing
is scored twice, and a killed stage resumes with the missing benchmarks.

An additional model, `retrieval`, is the base with the nearest training documents in its prompt. It shows
whether fine-tuning was needed; the gate ignores it.
"""

from typing import Annotated

from pydantic import Field

from nightshift.core.config import Count, StageParams


class RetrievalParams(StageParams):
    """Retrieval baseline without training.

    Attributes:
        documents: Training documents placed before each question.
        benchmarks: Names of the benchmarks it is scored on.
    """

    documents: Count
    benchmarks: Annotated[list[str], Field(min_length=1)]


class EvaluateParams(StageParams):
    """Items and batch size of the evaluation.

    Attributes:
        limit: Items per benchmark, evenly spread over it; None for all.
        batch_size: Sequences per forward pass.
        retrieval: Baseline with documents in the prompt; None disables it.
    """

    limit: Count | None
    batch_size: Count
    retrieval: RetrievalParams | None
