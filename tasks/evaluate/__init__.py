"""Score base, candidate and champion: data/sft, data/champion, benchmarks -> data/evaluate.

All models answer the same items. Benchmarks (`nightshift.data.benchmarks`) are multiple choice,
generation, invariance or direction. The test set gives a token-weighted loss, and on request a benchmark of
its own, `test_answers`: generated answers that are compared with those of the data. Scores are stored per
item, because the gate pairs them. They are cached by the content of model, benchmark and code: nothing is
scored twice, and a killed stage resumes with the missing benchmarks.

An additional model, `retrieval`, is the base with the nearest training documents in its prompt. It shows
whether fine-tuning was needed; the gate ignores it.
"""

from typing import Annotated, Literal

from pydantic import Field

from nightshift.core.config import Count, StageParams
from nightshift.replies import EndpointParams


class RetrievalParams(StageParams):
    """Retrieval baseline without training.

    Attributes:
        documents: Training documents placed before each question.
        benchmarks: Names of the benchmarks it is scored on.
    """

    documents: Count
    benchmarks: Annotated[list[str], Field(min_length=1)]


class ExactMatchParams(StageParams):
    """The benchmark `test_answers`: generated answers, compared with the last answers of test examples.

    Attributes:
        max_new_tokens: Tokens of a generated answer; longer answers in the test set are not asked for.
        limit: Test examples, at most; None for all.
    """

    max_new_tokens: Count
    limit: Count | None


class VllmParams(StageParams):
    """Size of the vLLM server that the stage starts.

    Attributes:
        tensor_parallel_size: GPUs over which each layer is spread.
        max_model_len: Tokens of a sequence, at most; None for the model's context length.
    """

    tensor_parallel_size: Count
    max_model_len: Count | None


class EvaluateParams(StageParams):
    """Engine, items and batch size of the evaluation.

    Attributes:
        engine: What runs the models: transformers in this environment, a vLLM server that the stage starts,
            or a server that runs already.
        vllm: Size of the vLLM server.
        endpoint: Server that runs already, and its limits.
        limit: Items per benchmark, evenly spread over it; None for all.
        batch_size: Sequences per forward pass.
        exact_match: Answers that are compared with those of the test set; None disables it.
        retrieval: Baseline with documents in the prompt; None disables it.
    """

    engine: Literal["transformers", "vllm", "endpoint"]
    vllm: VllmParams
    endpoint: EndpointParams
    limit: Count | None
    batch_size: Count
    exact_match: ExactMatchParams | None
    retrieval: RetrievalParams | None
