"""Paraphrase training examples, so that a fact is learned and not a sentence: data/split -> data/augment.

The gain of several wordings over one is measured in arXiv 2312.05934. A backend proposes, the
quality check decides; what it rejects is kept with its reason. Only train is augmented, and a
paraphrase stays in the group of its parent.
"""

from typing import Annotated, Literal

from pydantic import Field

from tasks.config import StageParams


class AugmentParams(StageParams):
    """How many paraphrases, from where, and how strict the quality check is.

    Attributes:
        backend: Where candidates come from.
        sources: Sources whose examples are paraphrased.
        paraphrases_per_example: Accepted paraphrases wanted for each example.
        max_similarity: Shingle Jaccard, 0 to 1, from which a candidate is a copy.
        min_acceptance_rate: Share of candidates, 0 to 1, below which the stage fails.
    """

    backend: Literal["rules"]
    sources: list[str]
    paraphrases_per_example: Annotated[int, Field(strict=True, ge=0, le=20)]
    max_similarity: Annotated[float, Field(gt=0, le=1)]
    min_acceptance_rate: Annotated[float, Field(ge=0, le=1)]
