"""Find the duplicate candidates of each text and verify them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from nightshift.data.text import (
    ALIKE,
    Shingles,
    comparable_shingles,
    is_another_question,
    is_short,
    jaccard,
)
from tasks.dedupe import DedupeParams
from tasks.dedupe.signatures import Keys
from tasks.dedupe.templates import Templates

# Cached shingle sets: about 0.5 GB for 100-word texts.
CACHED_SETS = 2**16
# Survivors with a common key that a later text is compared with. Without a limit, texts just below the
# threshold would cost the square of their number.
LARGEST_BUCKET = 32


class Text(NamedTuple):
    """Canonical text of an example, in two parts.

    Attributes:
        prompt: Text before the last answer; empty for a plain text.
        answer: Last answer, or the plain text.
    """

    prompt: str
    answer: str

    @property
    def whole(self) -> str:
        """Both parts, joined."""
        return f"{self.prompt} {self.answer}" if self.prompt else self.answer


@dataclass(frozen=True, slots=True)
class Removal:
    """Removal of one text.

    Attributes:
        kept: Index of the text kept instead.
        jaccard: Exact Jaccard similarity of the two texts, 0 to 1.
        reason: `normalized_duplicate` or `near_duplicate`.
        near: Indices of all survivors above the threshold, `kept` first.
    """

    kept: int
    jaccard: float
    reason: str
    near: tuple[int, ...]


def keep_first(
    texts: Sequence[Text], keys: Keys, params: DedupeParams, templates: Templates
) -> dict[int, Removal]:
    """Find the near-duplicates of earlier survivors.

    Args:
        texts: Texts in order of arrival, no two equal, shape (n,).
        keys: Band keys of the texts, shape (n, bands).
        params: MinHash parameters.
        templates: Passages that many prompts share.

    Returns:
        index -> removal. The decision on a text depends only on it, on earlier texts and on the templates.
    """

    @lru_cache(CACHED_SETS)
    def whole(index: int) -> Shingles:
        return comparable_shingles(texts[index].whole, params.shingle_size)

    @lru_cache(CACHED_SETS)
    def own(index: int) -> tuple[Shingles, Shingles]:
        return own_shingles(texts[index], params.shingle_size, templates)

    def find_similarity(one: int, other: int) -> float:
        similarity = jaccard(whole(one), whole(other))
        if similarity < params.jaccard_threshold:
            return 0
        pair = (texts[one], texts[other])
        if not any(text.prompt for text in pair):
            return similarity
        # Few pairs come so far.
        is_near = is_near_duplicate(pair, (own(one), own(other)), params.jaccard_threshold)
        return similarity if is_near else 0

    removals: dict[int, Removal] = {}
    survivors: dict[int, list[int]] = defaultdict(list)
    for i, buckets in shared_buckets(keys):
        candidates = sorted({other for bucket in buckets for other in survivors[bucket]})
        near = [(other, similarity) for other in candidates if (similarity := find_similarity(i, other))]
        if near:
            kept, similarity = near[0]
            removals[i] = Removal(kept, similarity, "near_duplicate", tuple(other for other, _ in near))
            continue
        for bucket in buckets:
            # So many texts that differ enough to survive: this key says nothing about a text.
            if len(survivors[bucket]) < LARGEST_BUCKET:
                survivors[bucket].append(i)
    return removals


def own_shingles(text: Text, size: int, templates: Templates) -> tuple[Shingles, Shingles]:
    """Return the shingles of a prompt that are not part of a template, and those of the answer."""
    answer = comparable_shingles(text.answer, size)
    if not text.prompt:
        return frozenset(), answer
    is_compared_by_words = templates and not is_short(text.prompt)
    own = templates.own(text.prompt) if is_compared_by_words else comparable_shingles(text.prompt, size)
    return own, answer


def is_near_duplicate(
    pair: tuple[Text, Text],
    shingles: tuple[tuple[Shingles, Shingles], tuple[Shingles, Shingles]],
    threshold: float,
) -> bool:
    """Return whether two texts with nearly the same words are near-duplicates.

    Those of their words that are not part of a template must be nearly the same, too. Their questions
    must be alike and their answers too: the same question answered differently is a label conflict, which a
    person has to resolve, and the same answer to another question is another example.

    Args:
        pair: Texts, at least one of them with a prompt.
        shingles: `own_shingles` of each.
        threshold: Least Jaccard similarity of near-duplicates, 0 to 1.
    """
    prompts = [text.prompt for text in pair]
    (own, answer), (other_own, other_answer) = shingles
    if prompts[0] == prompts[1]:
        return jaccard(answer, other_answer) >= threshold
    return (
        not is_another_question(*(prompt.split() for prompt in prompts))
        and jaccard(answer, other_answer) >= ALIKE
        and bool(own and other_own)
        and jaccard(own, other_own) >= ALIKE
        and jaccard(own | answer, other_own | other_answer) >= threshold
    )


def shared_buckets(keys: Keys) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, buckets) of each text that shares a bucket with another, in order of index.

    A bucket is a (band, key) pair, given as a number. O(n log n) per band.
    """
    members, buckets = [], []
    for band in range(keys.shape[1]):
        _, numbers, counts = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[numbers] > 1)
        members.append(shared)
        buckets.append(numbers[shared] + band * len(keys))
    order = np.argsort(np.concatenate(members), kind="stable")
    pairs = zip(np.concatenate(members)[order].tolist(), np.concatenate(buckets)[order].tolist(), strict=True)
    for index, some in groupby(pairs, key=itemgetter(0)):
        yield index, [bucket for _, bucket in some]
