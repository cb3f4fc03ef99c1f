"""Paraphrase training examples, so that a fact is learned and not a sentence: data/split -> data/augment.

The gain of several wordings over one is measured in arXiv 2312.05934. A backend proposes, the quality gate
decides; what it rejects is kept with its reason and scores. Only train is augmented, and a paraphrase
stays in the group of its parent.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nightshift.core.config import Count, StageParams
from nightshift.replies import EndpointParams

Share = Annotated[float, Field(ge=0, le=1)]
Style = Literal["reword", "question_answer", "reversed", "context_shift"]


class AugmentParams(StageParams):
    """How many paraphrases, from where, and how strict the quality gate is.

    Attributes:
        backend: Where candidates come from.
        model: Folder of a local model (null: the base), or the name that the endpoint knows it by.
        sources: Sources whose examples are paraphrased.
        paraphrases_per_example: Accepted paraphrases wanted for each example.
        over_generation: Further candidates in each call, since some are rejected.
        styles: Weight of each style of paraphrase.
        temperature: Of the sampling.
        top_p: Share of the probability that is sampled from.
        max_new_tokens: Tokens of one answer, at most.
        seed: Of the sampling and of the choice of styles.
        max_similarity: Shingle Jaccard with the source, 0 to 1, from which a candidate is a copy.
        max_sibling_similarity: The same with accepted paraphrases of the same example.
        embedder: Folder or package of a sentence embedder that compares meanings, or null.
        min_meaning_similarity: Cosine, 0 to 1, below which the meaning has changed.
        min_acceptance_rate: Share of candidates, 0 to 1, below which the stage fails.
        endpoint: The server of the backend `openai`.
    """

    backend: Literal["rules", "transformers", "openai"]
    model: str | None
    sources: list[str]
    paraphrases_per_example: Annotated[int, Field(strict=True, ge=0, le=20)]
    over_generation: Annotated[int, Field(strict=True, ge=0, le=20)]
    styles: dict[Style, Annotated[float, Field(gt=0)]]
    temperature: Annotated[float, Field(gt=0, le=2)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    seed: Annotated[int, Field(strict=True, ge=0)]
    max_similarity: Annotated[float, Field(gt=0, le=1)]
    max_sibling_similarity: Annotated[float, Field(gt=0, le=1)]
    embedder: str | None
    min_meaning_similarity: Share
    min_acceptance_rate: Share
    endpoint: EndpointParams

    @model_validator(mode="after")
    def _something_can_be_asked(self) -> "AugmentParams":
        if not self.styles:
            raise ValueError("styles must hold at least one style with a weight")
        if self.backend == "openai" and not self.model:
            raise ValueError("backend openai needs augment.model, the name that the endpoint knows it by")
        return self
