"""Text comparison: canonical form, shingles, exact Jaccard similarity."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

WORD = re.compile(r"\w+")
# A shorter text has too few word shingles: changing one word of seven moves the similarity of
# 3-shingles from 1 to 0.25. Its character shingles are compared instead.
SHORT = 8
CHARACTER_SHINGLE = 5
Shingles = frozenset[str]
_ASCII = "".join(chr(c).lower() if chr(c).isalnum() or chr(c) == "_" else " " for c in range(128))


def canonical(text: str) -> str:
    """Reduce a text to its words: no case, punctuation, spacing or variant code points.

    Example:
        >>> canonical("Who  ARE you?")
        'who are you'
    """
    if text.isascii():
        # Same result, three times as fast.
        return " ".join(text.translate(_ASCII).split())
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def canonical_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the canonical text of turns, with their roles and tool calls.

    Example:
        >>> canonical_messages([{"role": "user", "content": "Who are you?"}])
        'user who are you'
    """
    return " ".join(
        f"{m['role']} {canonical(m['content'])} {canonical(m.get('tool_calls') or '')}".rstrip()
        for m in messages
    )


def is_short(text: str) -> bool:
    """Return whether a canonical text has fewer than `SHORT` words."""
    return text.count(" ") < SHORT - 1


def comparable_shingles(text: str, size: int) -> Shingles:
    """Return the shingles for comparing a canonical text: of words, or of characters if it is short.

    Example:
        >>> len(comparable_shingles("who am", 3))
        2
    """
    return shingles(text, CHARACTER_SHINGLE) if is_short(text) else shingles(text.split(), size)


def shingles(units: Sequence[str], size: int) -> Shingles:
    """Return the n-grams of words or of a string's characters; fewer units than `size` give one shingle.

    Example:
        >>> sorted(shingles(["a", "b", "c", "d"], 3))
        ['a b c', 'b c d']
        >>> shingles(["a"], 3)
        frozenset({'a'})
    """
    if len(units) < size:
        return frozenset([" ".join(units)])
    return frozenset(map(" ".join, zip(*(units[i:] for i in range(size)), strict=False)))


def jaccard(a: Shingles, b: Shingles) -> float:
    """Return the exact Jaccard similarity of two non-empty shingle sets, 0 to 1.

    Example:
        >>> jaccard(shingles("ab", 1), shingles("bc", 1))
        0.3333333333333333
    """
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
