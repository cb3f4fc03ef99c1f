"""Index of evaluation questions: what is searched for in training rows, and which questions have it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nightshift.data.clusters import Asked
from nightshift.data.text import count_words, ngrams
from tasks.decontaminate import DecontaminateParams

Numbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Question:
    """An evaluation question in canonical form.

    Attributes:
        benchmark: Name of the benchmark.
        item: Id of the item.
        text: Canonical text.
        shingles: Numbers of its shingles; none if it is too short to be searched for inside a text.
    """

    benchmark: str
    item: str
    text: str
    shingles: frozenset[int]


class Passages(NamedTuple):
    """What is searched for in training rows; lookup time does not grow with the number of questions.

    Attributes:
        texts: Whole text -> position of the question.
        ngrams: n-gram of a long question -> position of the question.
        shingles: Shingle of a question -> its number.
    """

    texts: Mapping[str, int]
    ngrams: Mapping[str, int]
    shingles: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Index:
    """Index of evaluation questions.

    Attributes:
        questions: All evaluation questions.
        passages: What is searched for.
        owners: Positions of the questions with each shingle, those of shingle 0 first, shape (n_owners,).
        edges: `owners[edges[i]:edges[i + 1]]` are those of shingle i, shape (n_shingles + 1,).
        is_test: Whether these are the prompts of test examples: one common n-gram is no overlap then, nor
            are other questions about the same document.
    """

    questions: Sequence[Question]
    passages: Passages
    owners: Numbers
    edges: NDArray[np.int64]
    is_test: bool

    def count_owners(self, shingles: Numbers) -> tuple[Numbers, NDArray[np.int64]]:
        """Return the questions that have some of these shingles, and how many each has.

        Args:
            shingles: Numbers of shingles, each once, shape (n,).

        Returns:
            Positions of the questions in order, and the counts, shape (n_found,).
        """
        owners = [self.owners[self.edges[one] : self.edges[one + 1]] for one in shingles.tolist()]
        return np.unique(np.concatenate([*owners, np.empty(0, np.int32)]), return_counts=True)

    def count_shingles(self, is_counted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the number of shingles of each question, of those that are counted, shape (n_questions,).

        Args:
            is_counted: Whether each shingle is counted, shape (n_shingles,).
        """
        return np.bincount(
            self.owners[np.repeat(is_counted, np.diff(self.edges))], minlength=len(self.questions)
        )


def build_index(questions: Iterable[Asked], params: DecontaminateParams, *, is_test: bool) -> Index:
    """Index the questions, except questions without words.

    Args:
        questions: Questions and their forms.
        params: Overlap thresholds.
        is_test: Whether these are the prompts of test examples.
    """
    found: dict[str, Question] = {}
    ngram_owners: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for one, (text, words, shingles) in questions:
        if not text or text in found:
            continue
        is_searched = count_words(words) >= params.min_question_words
        own = [numbers.setdefault(shingle, len(numbers)) for shingle in shingles] if is_searched else []
        for gram in ngrams(words, params.ngram_size) if is_searched and not is_test else ():
            ngram_owners.setdefault(gram, len(found))
        found[text] = Question(one.benchmark, one.item, text, frozenset(own))
    listed = list(found.values())
    sizes = [len(one.shingles) for one in listed]
    flat = np.fromiter((number for one in listed for number in one.shingles), np.int32, sum(sizes))
    order = np.argsort(flat, kind="stable")
    owners = np.repeat(np.arange(len(listed), dtype=np.int32), sizes)[order]
    edges = np.searchsorted(flat[order], np.arange(len(numbers) + 1))
    passages = Passages({text: position for position, text in enumerate(found)}, ngram_owners, numbers)
    return Index(listed, passages, owners, edges, is_test)
