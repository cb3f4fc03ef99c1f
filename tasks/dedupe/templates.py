"""Find the texts that share a template, and what is their own in them.

Thousands of prompts may begin with one system prompt, quote the same document, or fill one instruction: by
their words they are nearly equal, and yet each asks something else. Passages of prompts that many texts
share are therefore not compared. Answers count in full, and so does a plain text.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from nightshift.data.text import Shingles
from tasks.dedupe.signatures import Keys

# A passage that more texts share is a template. Copies of one text seldom come in such numbers.
MANY = 10
# Counters of passages, by the last bits of their hash: 64 MiB.
COUNTERS = 2**24
# Multipliers of the words of a passage (odd constants of splitmix64 and xxHash).
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
# Passages that are counted at once.
CHUNK = 2**21


def find_shared_keys(keys: Keys) -> NDArray[np.bool_]:
    """Return which keys many texts share, shape (n, bands)."""
    is_shared = np.zeros(keys.shape, dtype=bool)
    for band in range(keys.shape[1]):
        _, numbers, counts = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        is_shared[:, band] = counts[numbers] > MANY
    return is_shared


class Templates:
    """Passages of three words that the prompts of many texts share."""

    def __init__(self, prompts: Iterable[str], size: int) -> None:
        """Count the passages of all prompts, each once per prompt.

        Args:
            prompts: Canonical prompts.
            size: Words of a passage, the same as of a shingle.
        """
        self._size = size
        self._hashes: dict[str, int] = {}
        counts = np.zeros(COUNTERS, dtype=np.uint32)
        chunk: list[NDArray[np.int64]] = []
        waiting = 0
        for prompt in prompts:
            chunk.append(np.unique(self._slots(prompt.split())))
            waiting += len(chunk[-1])
            if waiting > CHUNK:
                counts += np.bincount(np.concatenate(chunk), minlength=COUNTERS).astype(np.uint32)
                chunk, waiting = [], 0
        if chunk:
            counts += np.bincount(np.concatenate(chunk), minlength=COUNTERS).astype(np.uint32)
        self._is_shared: NDArray[np.bool_] = counts > MANY

    def __bool__(self) -> bool:
        """Return whether any passage is shared."""
        return bool(self._is_shared.any())

    def own(self, prompt: str) -> Shingles:
        """Return the shingles of a prompt that few texts share; empty if it is only a template."""
        words = prompt.split()
        own = np.flatnonzero(~self._is_shared[self._slots(words)])
        return frozenset(" ".join(words[start : start + self._size]) for start in own.tolist())

    def _slots(self, words: Sequence[str]) -> NDArray[np.int64]:
        """Return the counter of each passage, shape (max(1, n_words - size + 1),)."""
        hashes = np.array([self._hash(word) for word in words], dtype=np.uint64)
        count = max(1, len(words) - self._size + 1)
        total = np.zeros(count, dtype=np.uint64)
        for offset in range(min(self._size, len(words))):
            total = (total ^ hashes[offset : offset + count]) * MULTIPLIERS[offset % len(MULTIPLIERS)]
            total ^= total >> np.uint64(29)
        return (total % np.uint64(COUNTERS)).astype(np.int64)

    def _hash(self, word: str) -> int:
        """Return the CRC-32 of a word."""
        known = self._hashes.get(word)
        if known is None:
            known = self._hashes[word] = zlib.crc32(word.encode())
        return known
