"""Which overlaps of a training row with evaluation questions make it a hit."""

from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nightshift.data.text import containment, is_another_question
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate.index import Index, Question
from tasks.decontaminate.overlaps import Found, Overlap, Row, Uses

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
# A passage in more training rows is a template or a document, no leaked question. Deduplication leaves one
# row of each text, so three rows that share a passage with a test example are no copies of it.
MANY_FOR_BENCHMARKS, MANY_FOR_TEST = 10, 2
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


class Shared(NamedTuple):
    """Passages of an index that many rows share, which are therefore not counted.

    Attributes:
        ngrams: n-grams.
        is_shared: Whether each shingle is one of them, shape (n_shingles,).
        sizes: Number of other shingles of each question, shape (n_questions,).
    """

    ngrams: frozenset[str]
    is_shared: NDArray[np.bool_]
    sizes: NDArray[np.int64]


def find_hits(
    found: Sequence[Found], benchmarks: Index, test: Index, params: DecontaminateParams
) -> dict[str, tuple[str, Hit]]:
    """Return row id -> (source, first evaluation question that the row overlaps with).

    Args:
        found: What all training rows have in common with the questions.
        benchmarks: Questions of the benchmarks.
        test: Prompts of the test examples.
        params: Overlap thresholds.
    """
    indexes = (benchmarks, test)
    shared = [
        find_shared((one.uses[number] for one in found), index, many)
        for number, (index, many) in enumerate(
            zip(indexes, (MANY_FOR_BENCHMARKS, MANY_FOR_TEST), strict=True)
        )
    ]
    hits = {}
    for row, overlaps in (pair for one in found for pair in one.rows):
        matches = (match(row, *one, params) for one in zip(overlaps, indexes, shared, strict=True))
        if hit := next(filter(None, matches), None):
            hits[row.id] = (row.source, hit)
    return hits


def find_shared(uses: Iterable[Uses], index: Index, many: int) -> Shared:
    """Find the passages of an index that more than `many` rows have.

    Args:
        uses: Uses in each batch.
        index: Questions.
        many: Number of rows.
    """
    ngrams: Counter[str] = Counter()
    count = len(index.passages.shingles)
    rows = np.zeros(count, np.int64)
    for one in uses:
        ngrams.update(one.ngrams)
        rows += np.bincount(one.shingles, minlength=count)
    is_shared = rows > many
    shared_ngrams = frozenset(gram for gram, number in ngrams.items() if number > many)
    return Shared(shared_ngrams, is_shared, index.count_shingles(~is_shared))


def match(
    row: Row, overlaps: Iterable[Overlap], index: Index, shared: Shared, params: DecontaminateParams
) -> Hit | None:
    """Return the first question of an index that a row overlaps with, or None.

    Args:
        row: Row.
        overlaps: What its texts have in common with the questions.
        index: Questions.
        shared: Passages that are not counted.
        params: Overlap thresholds.
    """
    for text, grams, shingles in overlaps:
        if (number := index.passages.texts.get(text)) is not None:
            return _hit(row, index.questions[number], "same_question", text, 1.0)
        for gram in grams:
            if gram not in shared.ngrams:
                question = index.questions[index.passages.ngrams[gram]]
                share = containment(question.shingles, frozenset(shingles.tolist()))
                return _hit(row, question, "shared_ngram", gram, share)
        positions, counts = index.count_owners(shingles[~shared.is_shared[shingles]])
        alike = positions[counts / shared.sizes[positions] >= params.max_containment].tolist()
        known = frozenset(shingles.tolist()) if alike else frozenset()
        for question in map(index.questions.__getitem__, alike):
            if containment(question.shingles, known) < params.max_containment:
                continue
            if index.is_test and is_another_question(text.split(), question.text.split()):
                continue
            reason = "shared_ngram" if f" {question.text} " in f" {text} " else "contained_question"
            return _hit(row, question, reason, question.text, containment(question.shingles, known))
    return None


def describe_hit(hit: Hit) -> str:
    """Describe a hit in one line: the row, the question, and the matching words."""
    return (
        f"{hit['origin']}: {hit['reason']} of {hit['benchmark']}/{hit['item']}: "
        f'"{shorten(hit["match"], SHOWN_CHARACTERS, placeholder=" ...")}"'
    )


def _hit(row: Row, question: Question, reason: str, match: str, containment: float) -> Hit:
    """Build the report row of a hit."""
    return {
        "id": row.id,
        "origin": row.origin,
        "benchmark": question.benchmark,
        "item": question.item,
        "reason": reason,
        "match": match,
        "containment": containment,
    }
