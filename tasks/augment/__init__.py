"""Paraphrase training examples, to teach facts rather than sentences: data/split -> data/augment.

arXiv 2312.05934 measures the gain of several wordings over one. A backend proposes candidates and the
quality gate accepts or rejects them; rejected candidates are kept with reason and scores. Only the
training set is augmented, and a paraphrase stays in the group of its parent.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nightshift.core.config import Count, StageParams
from nightshift.replies import EndpointParams

Share = Annotated[float, Field(ge=0, le=1)]
Style = Literal["reword", "question_answer", "reversed", "context_shift"]


class AugmentParams(StageParams):
    """Number of paraphrases, backend, and thresholds of the quality gate.

    Attributes:
        backend: Backend that generates candidates.
        model: Folder of a local model (null: the base model), or model name on the endpoint.
        sources: Sources whose examples are paraphrased.
        paraphrases_per_example: Accepted paraphrases wanted per example.
        over_generation: Extra candidates per call, because some are rejected.
        styles: Weight of each paraphrase style.
        temperature: Sampling temperature.
        top_p: Probability mass of nucleus sampling, 0 to 1.
        max_new_tokens: Tokens per answer, at most.
        seed: Seed of the sampling and of the style choice.
        max_similarity: Shingle Jaccard similarity to the source, 0 to 1, that makes a candidate a copy.
        max_sibling_similarity: The same limit for accepted paraphrases of the same example.
        embedder: Folder or package of a sentence embedder that compares meanings, or null.
        min_meaning_similarity: Cosine similarity, 0 to 1, below which the meaning has changed.
        min_acceptance_rate: Share of accepted candidates, 0 to 1, below which the stage fails.
        endpoint: Server of the backend `openai`.
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
    def _styles_and_model_are_set(self) -> "AugmentParams":
        if not self.styles:
            raise ValueError("styles must contain at least one style with a weight")
        if self.backend == "openai" and not self.model:
            raise ValueError("backend openai needs augment.model, the model name on the endpoint")
        return self
