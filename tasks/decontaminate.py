"""Remove from train what asks an evaluation question: data/augment -> data/decontaminate.

Runs after augmentation, because a paraphrase may land on a held-out wording. A train row is a hit when
one of its user turns (or its plain text) equals an evaluation question after normalisation, shares an
n-gram with it, or contains nearly all of its shingles. Answers never count: a fact must be in train to
be learned.

Source: n-gram overlap as in GPT-3 (arXiv 2005.14165, appendix C), which leaves questions shorter than
the n-gram unseen; those match by the whole text or by containment.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from tasks.config import StageParams, load_params
from tasks.errors import DataError
from tasks.files import iterate_batches, iterate_rows, read_jsonl, write_batches, write_rows
from tasks.schemas import AUGMENTED
from tasks.stage import DATA, run_main, write_summary
from tasks.text import Shingles, canonical, shingles

SOURCE = DATA / "augment" / "train.parquet"
TEST = DATA / "split" / "test.parquet"
BENCHMARKS = DATA / "benchmarks"
TARGET = DATA / "decontaminate" / "train.parquet"
HITS = DATA / "decontaminate" / "hits.parquet"
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
# Every overlap that counts contains a shingle of this size, so they serve as the index.
SHINGLE_SIZE = 3
Row = dict[str, Any]


class DecontaminateParams(StageParams):
    """When two questions overlap.

    Attributes:
        ngram_size: Words in a row that train and an evaluation question must not share; a shorter
            question is matched by all its words in a row.
        min_question_words: Questions of fewer words are too common to be looked for inside a longer
            text; they match as a whole.
        max_containment: Share, 0 to 1, of a question's word 3-shingles that a train text may contain.
    """

    ngram_size: Annotated[int, Field(strict=True, ge=5)]
    min_question_words: Annotated[int, Field(strict=True, ge=3)]
    max_containment: Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True)
class Question:
    """An evaluation question, canonical."""

    benchmark: str
    item: str
    text: str
    shingles: Shingles


@dataclass(frozen=True, slots=True)
class Index:
    """Evaluation questions by their whole text and by each shingle (positions in `questions`)."""

    questions: Sequence[Question]
    by_text: Mapping[str, int]
    by_shingle: Mapping[str, Sequence[int]]


def main() -> None:
    """Write the clean train rows and a report that names each hit."""
    params = load_params(DecontaminateParams, "decontaminate")
    index = build_index(evaluation_questions(TEST, BENCHMARKS), params.min_question_words)
    hits: dict[str, Row] = {}
    rows_in = 0
    for row in iterate_rows(SOURCE, ["id", "origin", "messages"]):
        rows_in += 1
        if hit := find_hit(row, index, params):
            hits[row["id"]] = hit
    clean = (
        batch.filter(pa.array([one not in hits for one in batch["id"].to_pylist()]))
        for batch in iterate_batches(SOURCE)
    )
    write_batches(TARGET, clean, AUGMENTED)
    write_rows(HITS, hits.values(), HITS_SCHEMA)
    write_summary(
        "decontaminate",
        rows_in=rows_in,
        rows_out=rows_in - len(hits),
        dropped=Counter(hit["reason"] for hit in hits.values()),
        hits_by_benchmark=dict(sorted(Counter(hit["benchmark"] for hit in hits.values()).items())),
        evaluation_questions=len(index.questions),
    )


def evaluation_questions(test: Path, benchmarks: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (benchmark, item id, question) of everything the model is evaluated on.

    Raises:
        DataError: A benchmark has no items.
    """
    for row in iterate_rows(test, ["id", "messages"]):
        for question in questions_of(row):
            yield "test", row["id"], question
    for file in sorted(benchmarks.glob("*/items.jsonl")):
        items = read_jsonl(file)
        if not items:
            raise DataError(f"{file}: no items; a benchmark needs at least one")
        for item in items:
            yield file.parent.name, str(item["id"]), item["question"]


def questions_of(row: Row) -> list[str]:
    """Return what a row asks: its user turns, or its plain text."""
    return [turn["content"] for turn in row["messages"] if turn["role"] in ("user", "text")]


def build_index(questions: Iterable[tuple[str, str, str]], min_words: int) -> Index:
    """Index the questions; those without a word are left out."""
    found: list[Question] = []
    by_text: dict[str, int] = {}
    by_shingle: dict[str, list[int]] = defaultdict(list)
    for benchmark, item, question in questions:
        text = canonical(question)
        if not text or text in by_text:
            continue
        by_text[text] = len(found)
        grams = shingles(text.split(), SHINGLE_SIZE)
        if text.count(" ") + 1 >= min_words:
            for gram in grams:
                by_shingle[gram].append(len(found))
        found.append(Question(benchmark, item, text, grams))
    return Index(found, by_text, by_shingle)


def find_hit(row: Row, index: Index, params: DecontaminateParams) -> Row | None:
    """Report the evaluation question that a row asks, or None.

    Returns:
        The row's id and origin, benchmark, item, reason, the words that match, and the share of the
        question's shingles in the row's text.
    """
    for content in questions_of(row):
        text = canonical(content)
        if (number := index.by_text.get(text)) is not None:
            return _hit(row, index.questions[number], "same_question", text, 1.0)
        words = text.split()
        grams = shingles(words, SHINGLE_SIZE)
        shared = Counter(
            number for gram in grams & index.by_shingle.keys() for number in index.by_shingle[gram]
        )
        for number in sorted(shared):
            question = index.questions[number]
            containment = shared[number] / len(question.shingles)
            if match := shared_ngram(question.text.split(), words, params.ngram_size):
                return _hit(row, question, "shared_ngram", match, containment)
            if containment >= params.max_containment:
                return _hit(row, question, "contained_question", question.text, containment)
    return None


def shared_ngram(question: list[str], words: list[str], ngram_size: int) -> str | None:
    """Return the first n-gram of a question that also stands in a text.

    Example:
        >>> shared_ngram("who found gallium in 1875".split(), "so who found gallium in 1875".split(), 13)
        'who found gallium in 1875'
    """
    size = min(ngram_size, len(question))
    known = shingles(words, size) if len(words) >= size else frozenset()
    grams = (" ".join(question[i : i + size]) for i in range(len(question) - size + 1))
    return next((gram for gram in grams if gram in known), None)


def _hit(row: Row, question: Question, reason: str, match: str, containment: float) -> Row:
    """Name one hit."""
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
