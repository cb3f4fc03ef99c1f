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

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from textwrap import shorten
from typing import Annotated, NamedTuple, TypedDict

import pyarrow as pa
from pydantic import Field

from nightshift.core.config import StageParams, load_params
from nightshift.core.files import iterate_batches, iterate_rows, write_batches, write_rows
from nightshift.core.paths import AUGMENTED_TRAIN, BENCHMARKS, CLEAN_TRAIN, CLUSTERS, HITS, TEST
from nightshift.core.stage import run_main, write_summary
from nightshift.data.benchmarks import HELDOUT, answers_of, evaluation_questions, prompt_of, questions_of
from nightshift.data.clusters import CLUSTERS_SCHEMA, Asked, find_clusters
from nightshift.data.drops import Drops, Rate, require_drop_rate
from nightshift.data.schemas import AUGMENTED, AugmentedExample
from nightshift.data.text import (
    QUESTION_SHINGLE,
    Shingles,
    canonical,
    containment,
    count_words,
    is_another_question,
    is_contained,
    iterate_shingles,
    ngrams,
    read_form,
)

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
# A text in canonical form, its words and its shingles, as in `nightshift.data.text.Form`.
Text = tuple[str, Sequence[str], Iterable[str]]
# What is read of a training row.
COLUMNS = [
    *("id", "source", "origin", "parent_id"),
    *("messages.list.element.role", "messages.list.element.content"),
]
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
        by_shingle: Shingle -> positions of the questions that have it.
        is_test: Whether these are the prompts of test examples: one common n-gram is no overlap then, nor
            are other questions about the same document.
    """

    questions: Sequence[Question]
    by_text: Mapping[str, int]
    by_ngram: Mapping[str, int]
    by_shingle: Mapping[str, Sequence[int]]
    is_test: bool


class Row(NamedTuple):
    """Identity of a training row."""

    id: str
    origin: str
    source: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """Passages that a text of a training row has in common with the questions of an index.

    Attributes:
        text: Canonical text.
        ngrams: Common n-grams, in order.
        shingles: Common shingles.
    """

    text: str
    ngrams: Sequence[str]
    shingles: Shingles


def main() -> None:
    """Write the clean training rows and a report of all hits."""
    params = load_params(DecontaminateParams, "decontaminate")
    questions = [(one, read_form(one.text)) for one in evaluation_questions(TEST, BENCHMARKS)]
    in_benchmarks = [asked for asked in questions if asked[0].benchmark != HELDOUT]
    benchmarks = build_index(in_benchmarks, params, is_test=False)
    in_test = [asked for asked in questions if asked[0].benchmark == HELDOUT]
    test = build_index(in_test, params, is_test=True)
    write_rows(CLUSTERS, find_clusters(questions, params), CLUSTERS_SCHEMA)
    drops = Drops()
    hits = find_hits(count_rows(iterate_rows(AUGMENTED_TRAIN, COLUMNS), drops), benchmarks, test, params)
    for row_source, hit in hits.values():
        drops.add(row_source, hit["reason"], describe_hit(hit))
    write_rows(HITS, (hit for _, hit in hits.values()), HITS_SCHEMA)
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
        hits_by_benchmark=dict(sorted(Counter(hit["benchmark"] for _, hit in hits.values()).items())),
        evaluation_questions=len(test.questions) + len(benchmarks.questions),
    )


def count_rows(rows: Iterable[AugmentedExample], drops: Drops) -> Iterator[AugmentedExample]:
    """Yield the rows, and count them by source."""
    for row in rows:
        drops.read[row["source"]] += 1
        yield row


def describe_hit(hit: Hit) -> str:
    """Describe a hit in one line: the row, the question, and the matching words."""
    return (
        f"{hit['origin']}: {hit['reason']} of {hit['benchmark']}/{hit['item']}: "
        f'"{shorten(hit["match"], SHOWN_CHARACTERS, placeholder=" ...")}"'
    )


def build_index(questions: Iterable[Asked], params: DecontaminateParams, *, is_test: bool) -> Index:
    """Index the questions, except questions without words.

    Args:
        questions: Questions and their forms.
        params: Overlap thresholds.
        is_test: Whether these are the prompts of test examples.
    """
    found: dict[str, Question] = {}
    for one, form in questions:
        if form.text and form.text not in found:
            found[form.text] = Question(one.benchmark, one.item, form.text, form.shingles)
    by_ngram: dict[str, int] = {}
    by_shingle: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(found.values()):
        words = question.text.split()
        if count_words(words) < params.min_question_words:
            continue
        for gram in ngrams(words, params.ngram_size) if not is_test else ():
            by_ngram.setdefault(gram, number)
        for shingle in question.shingles:
            by_shingle[shingle].append(number)
    by_text = {text: number for number, text in enumerate(found)}
    return Index(list(found.values()), by_text, by_ngram, by_shingle, is_test)


def find_hits(
    rows: Iterable[AugmentedExample], benchmarks: Index, test: Index, params: DecontaminateParams
) -> dict[str, tuple[str, Hit]]:
    """Return row id -> (source, first evaluation question that the row overlaps with)."""
    indexes = (benchmarks, test)
    overlaps: list[tuple[Row, list[list[Overlap]]]] = []
    rows_with: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for example in rows:
        turns, prompt = questions_of(example), prompt_of(example)
        asked = [*turns, "\n".join(turns)] if len(turns) > 1 else turns
        # Usually, the only turn is the prompt.
        forms = {text: read_form(text) for text in {*asked, prompt}}
        told = read_answers(example, params) if benchmarks.questions else ()
        texts = ([*(forms[text] for text in asked), *told], [forms[prompt]])
        found = [find_overlaps(some, index, params) for some, index in zip(texts, indexes, strict=True)]
        if any(found):
            overlaps.append((Row(example["id"], example["origin"], example["source"]), found))
        # A paraphrase shares the passages of its source, which makes them no template.
        if example["parent_id"] is None:
            for counts, some in zip(rows_with, found, strict=True):
                counts.update({passage for one in some for passage in (*one.ngrams, *one.shingles)})
    shared = [
        {passage for passage, count in counts.items() if count > many}
        for counts, many in zip(rows_with, (MANY_FOR_BENCHMARKS, MANY_FOR_TEST), strict=True)
    ]
    hits = {}
    for row, found in overlaps:
        matches = (match(row, *one, params) for one in zip(found, indexes, shared, strict=True))
        if hit := next(filter(None, matches), None):
            hits[row.id] = (row.source, hit)
    return hits


def read_answers(row: AugmentedExample, params: DecontaminateParams) -> Iterator[Text]:
    """Yield the answers that may be a quiz, with questions in them; a short one is too common."""
    for answer in answers_of(row):
        text = canonical(answer)
        words = text.split()
        if count_words(words) >= params.min_question_words:
            yield text, words, iterate_shingles(words, QUESTION_SHINGLE)


def find_overlaps(texts: Iterable[Text], index: Index, params: DecontaminateParams) -> list[Overlap]:
    """Find what the texts of a row have in common with any question."""
    found = []
    for text, words, own in texts:
        known = frozenset(filter(index.by_shingle.__contains__, own))
        # A common n-gram consists of common shingles. The index of the test examples has none.
        runs = ngrams(words, params.ngram_size) if known and index.by_ngram else ()
        grams = [gram for gram in runs if gram in index.by_ngram]
        if known or text in index.by_text:
            found.append(Overlap(text, grams, known))
    return found


def match(
    row: Row, overlaps: Iterable[Overlap], index: Index, shared: Set[str], params: DecontaminateParams
) -> Hit | None:
    """Return the first question of an index that a row overlaps with, or None.

    Args:
        row: Row.
        overlaps: What its texts have in common with the questions.
        index: Questions.
        shared: Passages that are not counted, because many rows share them.
        params: Overlap thresholds.
    """
    for overlap in overlaps:
        if (number := index.by_text.get(overlap.text)) is not None:
            return _hit(row, index.questions[number], "same_question", overlap.text, 1.0)
        for gram in overlap.ngrams:
            if gram not in shared:
                question = index.questions[index.by_ngram[gram]]
                share = containment(question.shingles, overlap.shingles)
                return _hit(row, question, "shared_ngram", gram, share)
        candidates = {number for shingle in overlap.shingles - shared for number in index.by_shingle[shingle]}
        for number in sorted(candidates):
            question = index.questions[number]
            if not is_contained(question.shingles, overlap.shingles, shared, params.max_containment):
                continue
            if index.is_test and is_another_question(overlap.text.split(), question.text.split()):
                continue
            whole = f" {question.text} " in f" {overlap.text} "
            reason = "shared_ngram" if whole else "contained_question"
            share = containment(question.shingles, overlap.shingles)
            return _hit(row, question, reason, question.text, share)
    return None


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


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
