"""How two texts are compared: canonical form, shingles, exact Jaccard similarity."""

import re
import unicodedata
from collections.abc import Iterable

WORD = re.compile(r"\w+")


def canonical(text: str) -> str:
    """Reduce a text to its words: no case, punctuation, spacing or variant code points.

    Example:
        >>> canonical("Who  ARE you?")
        'who are you'
    """
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def canonical_messages(messages: Iterable[dict[str, str]]) -> str:
    """Canonical text of a conversation, with its roles.

    Example:
        >>> canonical_messages([{"role": "user", "content": "Who are you?"}])
        'user who are you'
    """
    return " ".join(f"{m['role']} {canonical(m['content'])}" for m in messages)


def shingles(text: str, size: int) -> frozenset[str]:
    """Return the word n-grams of a canonical text; a shorter text is one shingle.

    Example:
        >>> sorted(shingles("a b c d", 3))
        ['a b c', 'b c d']
    """
    words = text.split()
    return frozenset(" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Exact similarity of two non-empty shingle sets, 0 to 1.

    Example:
        >>> jaccard(frozenset("ab"), frozenset("bc"))
        0.3333333333333333
    """
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
