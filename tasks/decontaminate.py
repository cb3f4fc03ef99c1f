"""Remove training rows that overlap with evaluation questions: data/augment -> data/decontaminate.

Runs after augmentation, because a paraphrase may reproduce a held-out wording. A training row is a hit
if one of its user turns (or its plain text) equals an evaluation question after normalisation, shares an
n-gram with it, or contains nearly all of its shingles. Answers are not compared: a fact must be in the
training set to be learned.

Source: n-gram overlap as in GPT-3 (arXiv 2005.14165, appendix C), which misses questions shorter than
the n-gram; these are matched by whole text or by containment.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Annotated, TypedDict

import pyarrow as pa
from pydantic import Field

from nightshift.core.config import StageParams, load_params
from nightshift.core.files import iterate_batches, iterate_rows, write_batches, write_rows
from nightshift.core.paths import AUGMENTED_TRAIN, BENCHMARKS, CLEAN_TRAIN, HITS, TEST
from nightshift.core.stage import run_main, write_summary
from nightshift.data.benchmarks import evaluation_questions, questions_of
from nightshift.data.drops import Drops, Rate, require_drop_rate
from nightshift.data.schemas import AUGMENTED, AugmentedExample
from nightshift.data.text import Shingles, canonical, shingles

HITS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("origin", pa.string()),
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("reason", pa.string()),
        ("match", pa.string()),
        ("containment", pa.float64()),
    ]
)
SHINGLE_SIZE = 3
# Characters of the matching words that an error message shows.
SHOWN_CHARACTERS = 80


class Hit(TypedDict):
    """A training row that overlaps with an evaluation question.

    Attributes:
        id: Id of the row.
        origin: Origin of the row.
        benchmark: Benchmark of the question.
        item: Id of the question.
        reason: same_question, shared_ngram or contained_question.
        match: Matching words.
        containment: Share of the question's shingles in the row's text, 0 to 1.
    """

    id: str
    origin: str
    benchmark: str
    item: str
    reason: str
    match: str
    containment: float


class DecontaminateParams(StageParams):
    """Overlap thresholds.

    Attributes:
        ngram_size: Words in an n-gram that a training text and an evaluation question must not share;
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


@dataclass(frozen=True, slots=True)
class Question:
    """An evaluation question in canonical form."""

    benchmark: str
    item: str
    text: str
    shingles: Shingles


@dataclass(frozen=True, slots=True)
class Index:
    """Index of evaluation questions; lookup time does not grow with their number.

    Attributes:
        questions: All evaluation questions.
        by_text: Whole text -> position in `questions`.
        by_ngram: n-gram of a long question -> position of the question.
        by_shingle: Shingle -> positions of the questions that have it in their prefix. A prefix holds
            the rarest shingles, enough of them that any text above the containment threshold shares one
            (prefix filter, as in Bayardo et al., 2007).
    """

    questions: Sequence[Question]
    by_text: Mapping[str, int]
    by_ngram: Mapping[str, int]
    by_shingle: Mapping[str, Sequence[int]]


def main() -> None:
    """Write the clean training rows and a report of all hits."""
    params = load_params(DecontaminateParams, "decontaminate")
    index = build_index(evaluation_questions(TEST, BENCHMARKS), params)
    hits: dict[str, Hit] = {}
    drops = Drops()
    for row in iterate_rows(AUGMENTED_TRAIN, ["id", "origin", "messages", "source"]):
        drops.read[row["source"]] += 1
        if hit := find_hit(row, index, params):
            hits[row["id"]] = hit
            drops.add(row["source"], hit["reason"], describe_hit(hit))
    write_rows(HITS, hits.values(), HITS_SCHEMA)
    require_drop_rate(
        drops,
        params.max_drop_rate,
        (HITS, "decontaminate.max_drop_rate"),
        "see the overlaps in this file, remove them from the rows or from snapshot.benchmarks",
    )
    clean = (
        batch.filter(pa.array([id_ not in hits for id_ in batch["id"].to_pylist()]))
        for batch in iterate_batches(AUGMENTED_TRAIN)
    )
    write_batches(CLEAN_TRAIN, clean, AUGMENTED)
    write_summary(
        "decontaminate",
        rows_in=drops.read.total(),
        rows_out=drops.read.total() - len(hits),
        dropped=drops.by_reason(),
        dropped_by_source=drops.by_source(),
        hits_by_benchmark=dict(sorted(Counter(hit["benchmark"] for hit in hits.values()).items())),
        evaluation_questions=len(index.questions),
    )


def describe_hit(hit: Hit) -> str:
    """Describe a hit in one line: the row, the question, and the matching words."""
    return (
        f"{hit['origin']}: {hit['reason']} of {hit['benchmark']}/{hit['item']}: "
        f'"{shorten(hit["match"], SHOWN_CHARACTERS, placeholder=" ...")}"'
    )


def build_index(questions: Iterable[tuple[str, str, str]], params: DecontaminateParams) -> Index:
    """Index the questions, except questions without words."""
    found: dict[str, Question] = {}
    for benchmark, item, content in questions:
        text = canonical(content)
        if text and text not in found:
            found[text] = Question(benchmark, item, text, shingles(text.split(), SHINGLE_SIZE))
    frequency = Counter(shingle for question in found.values() for shingle in question.shingles)
    by_ngram: dict[str, int] = {}
    by_shingle: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(found.values()):
        words = question.text.split()
        if len(words) < params.min_question_words:
            continue
        for gram in ngrams(words, params.ngram_size):
            by_ngram.setdefault(gram, number)
        needed = math.ceil(params.max_containment * len(question.shingles))
        rarest = sorted(question.shingles, key=lambda shingle: (frequency[shingle], shingle))
        for shingle in rarest[: len(rarest) - needed + 1]:
            by_shingle[shingle].append(number)
    by_text = {text: number for number, text in enumerate(found)}
    return Index(list(found.values()), by_text, by_ngram, by_shingle)


def find_hit(row: AugmentedExample, index: Index, params: DecontaminateParams) -> Hit | None:
    """Return the first evaluation question that a row overlaps with, or None."""
    for content in questions_of(row):
        text = canonical(content)
        if (number := index.by_text.get(text)) is not None:
            return _hit(row, index.questions[number], "same_question", text, 1.0)
        words = text.split()
        known = shingles(words, SHINGLE_SIZE)
        for gram in ngrams(words, params.ngram_size):
            if (number := index.by_ngram.get(gram)) is not None:
                question = index.questions[number]
                return _hit(row, question, "shared_ngram", gram, containment(question, known))
        candidates = {number for shingle in known for number in index.by_shingle.get(shingle, ())}
        for number in sorted(candidates):
            question = index.questions[number]
            if (share := containment(question, known)) >= params.max_containment:
                whole = f" {question.text} " in f" {text} "
                reason = "shared_ngram" if whole else "contained_question"
                return _hit(row, question, reason, question.text, share)
    return None


def containment(question: Question, known: Shingles) -> float:
    """Return the share of a question's shingles that a text contains, 0 to 1."""
    return len(question.shingles & known) / len(question.shingles)


def ngrams(words: Sequence[str], size: int) -> Iterator[str]:
    """Yield the word n-grams of a text in order; none if the text is shorter than n.

    Example:
        >>> list(ngrams(["a", "b", "c"], 2)), list(ngrams(["a"], 2))
        (['a b', 'b c'], [])
    """
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def _hit(row: AugmentedExample, question: Question, reason: str, match: str, containment: float) -> Hit:
    """Build the report row of a hit."""
    return {
        "id": row["id"],
        "origin": row["origin"],
        "benchmark": question.benchmark,
        "item": question.item,
        "reason": reason,
        "match": match,
        "containment": containment,
    }


if __name__ == "__main__":
    run_main(main)
