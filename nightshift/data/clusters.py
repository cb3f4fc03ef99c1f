"""Clusters of evaluation items that ask for the same: the gate's tests count each cluster once.

A model that has learned a fact answers all its questions, so two of them are not twice the evidence. Items
are related if they name the same cluster, if one is the paraphrase of another, if they have the same
question or share an n-gram, or if one question contains nearly all of the other: what the stage decontaminate
takes for the same question. Passages that many items share are a template.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import pyarrow as pa

from nightshift.data.benchmarks import HELDOUT, Question
from nightshift.data.components import connect
from nightshift.data.text import (
    Shingles,
    canonical,
    containment,
    is_another_question,
    ngrams,
    shingles,
    weight,
)

CLUSTERS_SCHEMA = pa.schema([("benchmark", pa.string()), ("item", pa.string()), ("cluster", pa.string())])
SHINGLE_SIZE = 3
# A passage in more questions is a template or a document.
MANY = 10
Item = tuple[str, str]


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


def find_clusters(questions: Iterable[Question], overlap: Overlap) -> Iterator[dict[str, str]]:
    """Yield benchmark, item and cluster of each item that is related to another one.

    Args:
        questions: Questions of all items, in every wording.
        overlap: Thresholds.

    Example:
        >>> class Usual:
        ...     ngram_size, min_question_words, max_containment = 13, 5, 0.8
        >>> asked = [("a", "1", "Who is king?"), ("b", "9", "Who IS king"), ("a", "2", "And the queen?")]
        >>> [one["item"] for one in find_clusters([Question(*one, None) for one in asked], Usual())]
        ['1', '9']
    """
    asked = list(questions)
    texts = [canonical(one.text) for one in asked]
    keys: dict[Item, list[str]] = defaultdict(list)
    for one, text in zip(asked, texts, strict=True):
        # A question without words, such as "?!", is not the same as another one.
        found = {"text": text, "name": one.cluster}
        keys[one.benchmark, one.item] += [f"{kind} {key}" for kind, key in found.items() if key]
        keys[one.benchmark, one.item].append(f"item {one.benchmark}/{one.paraphrase_of or one.item}")
    for number, pair in enumerate(same_questions(asked, texts, overlap)):
        for one in pair:
            keys[one.benchmark, one.item].append(f"pair {number}")
    items, components = list(keys), connect(keys.values())
    sizes = Counter(components)
    for (benchmark, item), component in zip(items, components, strict=True):
        if sizes[component] > 1:
            yield {"benchmark": benchmark, "item": item, "cluster": "/".join(items[component])}


def same_questions(
    asked: Sequence[Question], texts: Sequence[str], overlap: Overlap
) -> Iterator[tuple[Question, Question]]:
    """Yield pairs of questions that share an n-gram, or of which one contains nearly all of the other.

    Args:
        asked: Questions.
        texts: Their canonical texts.
        overlap: Thresholds.
    """
    grams: dict[str, list[int]] = defaultdict(list)
    by_shingle: dict[str, list[int]] = defaultdict(list)
    parts: dict[int, Shingles] = {}
    for number, text in enumerate(texts):
        words = text.split()
        # Test examples about one document share n-grams.
        for gram in set(ngrams(words, overlap.ngram_size)) if asked[number].benchmark != HELDOUT else ():
            grams[gram].append(number)
        if sum(map(weight, words)) >= overlap.min_question_words:
            parts[number] = shingles(words, SHINGLE_SIZE)
            for one in parts[number]:
                by_shingle[one].append(number)
    for numbers in grams.values():
        if len(numbers) <= MANY:
            yield from ((asked[a], asked[b]) for a, b in pairwise(numbers))
    shared = {one for one, numbers in by_shingle.items() if len(numbers) > MANY}
    for number, whole in parts.items():
        own = whole - shared
        for other in sorted({one for part in own for one in by_shingle[part]} - {number}):
            is_known = all(
                containment(part, parts[other]) >= overlap.max_containment for part in (whole, own)
            )
            if is_known and not are_about_one_document(
                asked[number], asked[other], texts[number], texts[other]
            ):
                yield asked[number], asked[other]


def are_about_one_document(one: Question, other: Question, text: str, other_text: str) -> bool:
    """Return whether two test examples ask different questions about the same document."""
    both_held_out = one.benchmark == other.benchmark == HELDOUT
    return both_held_out and is_another_question(text.split(), other_text.split())
