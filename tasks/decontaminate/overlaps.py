"""What training rows have in common with evaluation questions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nightshift.core.workers import Work
from nightshift.data.benchmarks import answers_of, prompt_of, questions_of
from nightshift.data.schemas import AugmentedExample
from nightshift.data.text import QUESTION_SHINGLE, canonical_words, count_words, iterate_shingles, ngrams
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate.index import Numbers, Passages

# What is read of a training row.
COLUMNS = [
    *("id", "source", "origin", "parent_id"),
    *("messages.list.element.role", "messages.list.element.content"),
]


class Text(NamedTuple):
    """A text in canonical form, its words and its shingles."""

    text: str
    words: Sequence[str]
    shingles: Sequence[str]


class Row(NamedTuple):
    """Identity of a training row."""

    id: str
    origin: str
    source: str


class Overlap(NamedTuple):
    """Passages that a text of a training row has in common with the questions of an index.

    Attributes:
        text: Canonical text.
        ngrams: Common n-grams, in order.
        shingles: Numbers of the common shingles, each once, shape (n_common,).
    """

    text: str
    ngrams: Sequence[str]
    shingles: Numbers


class Uses(NamedTuple):
    """How many rows of a batch have each passage of an index.

    A paraphrase is not counted: it shares the passages of its source, which makes them no template.

    Attributes:
        ngrams: n-gram -> number of rows.
        shingles: Number of each shingle, as often as there are rows with it.
    """

    ngrams: Counter[str]
    shingles: Numbers


class Found(NamedTuple):
    """What a batch of training rows has in common with the benchmarks, and with the test examples.

    Attributes:
        sources: Number of rows of each source.
        rows: Rows with overlaps, and their overlaps with each index.
        uses: Rows with each passage of each index.
    """

    sources: Counter[str]
    rows: list[tuple[Row, list[list[Overlap]]]]
    uses: list[Uses]


def start_search(
    benchmarks: Passages, test: Passages, params: DecontaminateParams
) -> AbstractContextManager[Work[pa.RecordBatch, Found]]:
    """Return `search_batches`, which needs nothing open."""
    return nullcontext(partial(search_batches, benchmarks=benchmarks, test=test, params=params))


def search_batches(
    batches: Iterable[pa.RecordBatch], benchmarks: Passages, test: Passages, params: DecontaminateParams
) -> Iterator[Found]:
    """Yield what each batch of training rows, with `COLUMNS`, has in common with evaluation questions."""
    for batch in batches:
        yield search(batch.to_pylist(), benchmarks, test, params)


def search(
    rows: Sequence[AugmentedExample], benchmarks: Passages, test: Passages, params: DecontaminateParams
) -> Found:
    """Find what training rows have in common with evaluation questions.

    Args:
        rows: Rows.
        benchmarks: What is searched for in each turn of a row.
        test: What is searched for in the prompt of a row.
        params: Overlap thresholds.
    """
    found = Found(Counter(row["source"] for row in rows), [], [])
    counted: list[list[list[Overlap]]] = []
    for row in rows:
        turns, prompt = questions_of(row), prompt_of(row)
        asked = [*turns, "\n".join(turns)] if len(turns) > 1 else turns
        # Usually, the only turn is the prompt.
        texts = {text: read_text(text) for text in {*asked, prompt}}
        told = read_answers(row, params) if benchmarks.texts else ()
        overlaps = [
            find_overlaps((*map(texts.__getitem__, asked), *told), benchmarks, params),
            find_overlaps([texts[prompt]], test, params),
        ]
        if any(overlaps):
            found.rows.append((Row(row["id"], row["origin"], row["source"]), overlaps))
            if row["parent_id"] is None:
                counted.append(overlaps)
    found.uses.extend(count_uses([overlaps[index] for overlaps in counted]) for index in range(2))
    return found


def read_text(text: str) -> Text:
    """Return a text in canonical form, with its words and shingles."""
    words = canonical_words(text)
    return Text(" ".join(words), words, [*iterate_shingles(words, QUESTION_SHINGLE)])


def read_answers(row: AugmentedExample, params: DecontaminateParams) -> list[Text]:
    """Return the answers that may be a quiz, with questions in them; a short one is too common."""
    read = map(read_text, answers_of(row))
    return [one for one in read if count_words(one.words) >= params.min_question_words]


def find_overlaps(texts: Iterable[Text], passages: Passages, params: DecontaminateParams) -> list[Overlap]:
    """Find what the texts of a row have in common with any question."""
    found = []
    for text, words, shingles in texts:
        common = filter(passages.shingles.__contains__, shingles)
        numbers = set(map(passages.shingles.__getitem__, common))
        # A common n-gram consists of common shingles. The index of the test examples has none.
        runs = ngrams(words, params.ngram_size) if numbers and passages.ngrams else ()
        grams = [gram for gram in runs if gram in passages.ngrams]
        if numbers or text in passages.texts:
            found.append(Overlap(text, grams, np.fromiter(numbers, np.int32, len(numbers))))
    return found


def count_uses(rows: Iterable[Sequence[Overlap]]) -> Uses:
    """Count the rows with each passage: one that has it in several texts counts once."""
    grams: Counter[str] = Counter()
    shingles = []
    for overlaps in rows:
        grams.update({gram for one in overlaps for gram in one.ngrams})
        own = [one.shingles for one in overlaps]
        shingles += own if len(own) == 1 else [np.unique(np.concatenate(own))] if own else []
    return Uses(grams, np.concatenate(shingles) if shingles else np.empty(0, np.int32))
