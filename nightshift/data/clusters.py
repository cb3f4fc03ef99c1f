"""Clusters of evaluation items that ask for the same: the gate's tests count each cluster once.

A model that has learned a fact answers all its questions, so two of them are not twice the evidence. Items
are related if they name the same cluster, if one is the paraphrase of another, if they have the same
question or share an n-gram, or if one question contains nearly all of the other: what the stage decontaminate
takes for the same question. Passages that many items share are a template.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Protocol

import pyarrow as pa

from nightshift.data.benchmarks import HELDOUT, Question
from nightshift.data.components import connect
from nightshift.data.text import Form, containment, count_words, is_another_question, ngrams

CLUSTERS_SCHEMA = pa.schema([("benchmark", pa.string()), ("item", pa.string()), ("cluster", pa.string())])
# A passage in more questions is a template or a document.
MANY = 10
Item = tuple[str, str]
Asked = tuple[Question, Form]


class Overlap(Protocol):
    """Thresholds of what decontaminate takes for the same question."""

    @property
    def ngram_size(self) -> int:
        """Words of an n-gram that two questions must not share."""

    @property
    def min_question_words(self) -> int:
        """Fewest words of a question that is searched for inside another."""

    @property
    def max_containment(self) -> float:
        """Share, 0 to 1, of a question's shingles in another one from which the two are the same."""


def find_clusters(questions: Sequence[Asked], overlap: Overlap) -> Iterator[dict[str, str]]:
    """Yield benchmark, item and cluster of each item that is related to another one.

    Args:
        questions: Questions of all items, in every wording, and their forms.
        overlap: Thresholds.

    Example:
        >>> from nightshift.data.text import read_form
        >>> class Usual:
        ...     ngram_size, min_question_words, max_containment = 13, 5, 0.8
        >>> asked = [("a", "1", "Who is king?"), ("b", "9", "Who IS king"), ("a", "2", "And the queen?")]
        >>> forms = [(Question(*one), read_form(one[2])) for one in asked]
        >>> [one["item"] for one in find_clusters(forms, Usual())]
        ['1', '9']
    """
    keys: dict[Item, list[str]] = defaultdict(list)
    for one, form in questions:
        # A question without words, such as "?!", is not the same as another one.
        found = {"text": form.text, "name": one.cluster}
        keys[one.benchmark, one.item] += [f"{kind} {key}" for kind, key in found.items() if key]
        keys[one.benchmark, one.item].append(f"item {one.benchmark}/{one.paraphrase_of or one.item}")
    pairs = chain(
        questions_sharing_ngrams(questions, overlap), questions_containing_others(questions, overlap)
    )
    for number, pair in enumerate(pairs):
        for one in pair:
            keys[one.benchmark, one.item].append(f"pair {number}")
    items, components = list(keys), connect(keys.values())
    sizes = Counter(components)
    for (benchmark, item), component in zip(items, components, strict=True):
        if sizes[component] > 1:
            yield {"benchmark": benchmark, "item": item, "cluster": "/".join(items[component])}


def questions_sharing_ngrams(
    questions: Sequence[Asked], overlap: Overlap
) -> Iterator[tuple[Question, Question]]:
    """Yield pairs of benchmark questions with an n-gram in common.

    Args:
        questions: Questions and their forms.
        overlap: Thresholds.
    """
    by_gram: dict[str, list[int]] = defaultdict(list)
    for number, (one, form) in enumerate(questions):
        # Test examples about one document share n-grams.
        for gram in set(ngrams(form.words, overlap.ngram_size)) if one.benchmark != HELDOUT else ():
            by_gram[gram].append(number)
    for numbers in by_gram.values():
        if len(numbers) <= MANY:
            yield from ((questions[a][0], questions[b][0]) for a, b in pairwise(numbers))


def questions_containing_others(
    questions: Sequence[Asked], overlap: Overlap
) -> Iterator[tuple[Question, Question]]:
    """Yield pairs of questions of which the second contains nearly all of the first.

    Args:
        questions: Questions and their forms.
        overlap: Thresholds.
    """
    parts = {
        number: form.shingles
        for number, (_, form) in enumerate(questions)
        if count_words(form.words) >= overlap.min_question_words
    }
    uses = Counter(chain.from_iterable(parts.values()))
    shared = {shingle for shingle, count in uses.items() if count > MANY}
    # Most shingles are in one question only.
    repeated = {shingle for shingle, count in uses.items() if 1 < count <= MANY}
    owners: dict[str, list[int]] = defaultdict(list)
    for number, whole in parts.items():
        for shingle in whole & repeated:
            owners[shingle].append(number)
    for number, whole in parts.items():
        counts = Counter(chain.from_iterable(map(owners.__getitem__, whole & repeated)))
        size = len(whole - shared)
        alike = {other for other, count in counts.items() if count / size >= overlap.max_containment}
        for other in sorted(alike - {number}):
            pair = (questions[number], questions[other])
            is_contained = containment(whole, parts[other]) >= overlap.max_containment
            if is_contained and not are_about_one_document(*pair):
                yield pair[0][0], pair[1][0]


def are_about_one_document(one: Asked, other: Asked) -> bool:
    """Return whether two test examples ask different questions about the same document."""
    both_held_out = one[0].benchmark == other[0].benchmark == HELDOUT
    return both_held_out and is_another_question(one[1].words, other[1].words)
