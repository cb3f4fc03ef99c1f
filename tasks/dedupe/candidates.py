"""Find the duplicate candidates of each text and verify them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np

from nightshift.data.text import Shingles, comparable_shingles, jaccard
from tasks.dedupe import DedupeParams
from tasks.dedupe.signatures import Keys

# Cached shingle sets: about 0.5 GB for 100-word texts.
CACHED_SETS = 2**16


@dataclass(frozen=True, slots=True)
class Text:
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


def keep_first(texts: Sequence[Text], keys: Keys, params: DedupeParams) -> dict[int, Removal]:
    """Find the near-duplicates of earlier survivors.

    A text with a survivor's prompt but another answer stays: that is a label conflict, which a person
    has to resolve.

    Args:
        texts: Texts in order of arrival, no two equal, shape (n,).
        keys: Band keys of the texts, shape (n, bands).
        params: MinHash parameters.

    Returns:
        index -> removal. The decision on a text depends only on it and on earlier texts.
    """

    @lru_cache(CACHED_SETS)
    def shingle_set(index: int) -> Shingles:
        return comparable_shingles(texts[index].whole, params.shingle_size)

    removals: dict[int, Removal] = {}
    survivors: dict[int, list[int]] = defaultdict(list)
    for i, buckets in shared_buckets(keys):
        candidates = sorted({other for bucket in buckets for other in survivors[bucket]})
        near = [
            (other, similarity)
            for other in candidates
            if (similarity := jaccard(shingle_set(i), shingle_set(other))) >= params.jaccard_threshold
            and not is_conflict(texts[i], texts[other], params)
        ]
        if near:
            kept, similarity = near[0]
            removals[i] = Removal(kept, similarity, "near_duplicate", tuple(other for other, _ in near))
            continue
        for bucket in buckets:
            survivors[bucket].append(i)
    return removals


def is_conflict(text: Text, other: Text, params: DedupeParams) -> bool:
    """Return whether two texts answer the same prompt differently."""
    if not text.prompt or text.prompt != other.prompt:
        return False
    answers = [comparable_shingles(one.answer, params.shingle_size) for one in (text, other)]
    return jaccard(answers[0], answers[1]) < params.jaccard_threshold


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
