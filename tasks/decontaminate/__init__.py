"""Remove training rows that overlap with evaluation questions: data/augment -> data/decontaminate.

Runs after augmentation, because a paraphrase may reproduce a held-out wording. A training row is a hit
if one of its user turns (or its plain text) equals a benchmark question after normalisation, shares an
n-gram with it, or contains nearly all of its shingles; or if its prompt (all turns but the assistant's)
contains nearly all of the prompt of a test example. Test examples come from the same data: their templates
and documents are in the training set by nature, and so are turns such as "Thanks!". Passages that many
rows share are therefore not counted, and a conversation is compared as a whole. Answers are searched for the
questions of benchmarks, as in a quiz, but are not compared with their answers: a fact must be in the training
set to be learned.

Sources: n-gram overlap as in GPT-3 (arXiv 2005.14165, appendix C), which misses questions shorter than
the n-gram; these are matched by whole text or by containment. NeMo Curator ignores n-grams with more than
10 matches, too.
"""

from typing import Annotated

from pydantic import Field

from nightshift.core.config import StageParams
from nightshift.data.drops import Rate


class DecontaminateParams(StageParams):
    """Overlap thresholds.

    Attributes:
        ngram_size: Words in an n-gram that a training text and a benchmark question must not share;
            a shorter question is matched as one n-gram of all its words.
        min_question_words: Fewest words of a question that is searched for inside longer texts; a
            shorter question is too common and must equal the whole text.
        max_containment: Share, 0 to 1, of a question's word 3-shingles that makes a training text a hit.
        max_drop_rate: Highest rate of hits, 0 to 1, overall and per source.
    """

    ngram_size: Annotated[int, Field(strict=True, ge=5)]
    min_question_words: Annotated[int, Field(strict=True, ge=3)]
    max_containment: Annotated[float, Field(gt=0, le=1)]
    max_drop_rate: Rate
