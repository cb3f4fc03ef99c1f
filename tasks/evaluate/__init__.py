"""Score base, candidate and champion on the same items: data/sft, data/champion, benchmarks -> data/evaluate.

Benchmarks (`nightshift.data.benchmarks`) are multiple choice, generation, invariance or direction; the
held-out split gives a token-weighted loss. Scores are kept per item, because the gate pairs them. They are
memoised by the content of model, benchmark and code: what was scored before is not scored again, and a stage
that was killed goes on with the benchmarks that are missing.

Beside them stands a model named `retrieval`: the base with the nearest training documents in its prompt. It
answers whether fine-tuning was needed, and takes no part in the gate's decision.
"""

from typing import Annotated

from pydantic import Field

from nightshift.core.config import Count, StageParams


class RetrievalParams(StageParams):
    """The baseline without training.

    Attributes:
        documents: Training documents that are put before each question.
        benchmarks: Benchmarks that it is asked, by their names.
    """

    documents: Count
    benchmarks: Annotated[list[str], Field(min_length=1)]


class EvaluateParams(StageParams):
    """How much to ask and how fast.

    Attributes:
        limit: Items of each benchmark, spread evenly over it; None asks all.
        batch_size: Sequences in one forward pass.
        retrieval: The baseline with documents in the prompt; None leaves it out.
    """

    limit: Count | None
    batch_size: Count
    retrieval: RetrievalParams | None
