"""Baseline without training: retrieve the training documents nearest to a question by BM25."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from nightshift.data.text import canonical

# Chunk size of longer texts: about a paragraph or two.
WORDS_PER_DOCUMENT = 200
Find = Callable[[str], list[str]]


def build_documents(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the documents: each question with its answer, or each chunk of a plain text.

    Of an example and its paraphrases only the first is used: the others would displace other facts.

    Args:
        rows: Rows of data/decontaminate/train.parquet.
    """
    families = set()
    for row in rows:
        family = row["parent_id"] or row["id"]
        if family in families:
            continue
        families.add(family)
        turns = row["messages"]
        for before, turn in zip([None, *turns], turns, strict=False):
            if turn["role"] == "text":
                words = turn["content"].split()
                for start in range(0, len(words), WORDS_PER_DOCUMENT):
                    yield " ".join(words[start : start + WORDS_PER_DOCUMENT])
            elif turn["role"] == "assistant" and turn["content"] and before:
                yield f"{before['content']}\n{turn['content']}"


def build_index(texts: Iterable[str], count: int) -> Find:
    """Index documents and return a function that retrieves those nearest to a question.

    Args:
        texts: Documents; equal documents are indexed once.
        count: Documents per question, at most.

    Returns:
        question -> documents, nearest first; ties keep the input order. A question that shares no word
        with any document finds none.
    """
    import bm25s

    known = list(dict.fromkeys(texts))
    index = bm25s.BM25()
    index.index([canonical(text).split() for text in known], show_progress=False)

    def find(question: str) -> list[str]:
        words = canonical(question).split()
        if not words:
            return []
        scores = index.get_scores(words)
        nearest = np.argsort(-scores, kind="stable")[:count]
        return [known[i] for i in nearest if scores[i] > 0]

    return find


def add_documents(question: str, found: Iterable[str]) -> str:
    r"""Prepend documents to a question.

    Example:
        >>> add_documents("Who?", ["It was me."])
        'Answer with the help of these notes.\n\nIt was me.\n\nWho?'
    """
    notes = list(found)
    return "\n\n".join(["Answer with the help of these notes.", *notes, question]) if notes else question
