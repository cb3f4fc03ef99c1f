"""Text comparison: canonical form, shingles, exact Jaccard similarity."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

# Letters of scripts without spaces between words: each is a word of its own.
_LETTERS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Accents and vowel signs that belong to the letter before them; without them, many Indic words would be the
# same. Whole blocks where letters and vowel signs alternate, without the full stops of Devanagari.
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1-\u05c7\u0610-\u061a\u064b-\u0670\u06d6-\u06ed\u0711-\u074a"
    "\u0816-\u082d\u08d3-\u0963\u0966-\u0dff\u0f18-\u0fbc\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u3099\u309a\ufe20-\ufe2f"
)
_VOWELS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3"
# Symbols of mathematics, currencies and code, and emoji: abs(-5) is not abs(5), and C++ is not C#. Those of
# `SIGNS` are punctuation or Markdown elsewhere.
_SYMBOLS = (
    "$+<=>|~^%&@\\[\\]{}\\\\"
    "\u00a2-\u00a9\u00ac\u00ae-\u00b1\u00d7\u00f7\u2044\u2052\u207a-\u207c\u208a-\u208c\u20a0-\u20cf\u2190-\u2bff"
    "\U0001f000-\U0001faff"
)
_SIGNS = "#/!*\\-"
# What str.isdigit() accepts after NFKC, and what str.isalnum() accepts.
_DIGIT = (
    "[\\d\u1369-\u1371\u19da\u24f5-\u24fd\u24ff\u2776-\u277e\u2780-\u2788\u278a-\u2792"
    "\U00010a40-\U00010a43\U00010e60-\U00010e68\U00011052-\U0001105a]"
)
_ALNUM = r"[^\W_]"
_LEFT, _RIGHT = rf"(?:{_ALNUM}|[)\]])", rf"(?:{_ALNUM}|[(\[])"
# A sign that is punctuation or Markdown. It is a symbol as a minus before a number, a slash or an asterisk
# between operands, several asterisks between words, a number sign next to a word, and an exclamation mark
# before a word or `=`, or after a digit. What precedes the sign is checked after it: a pattern that begins
# with a set of characters is found several times as fast.
PUNCTUATION = re.compile(
    rf"""[{_SIGNS}](?:
        (?<=-) (?![ ]?{_DIGIT})
        | (?<=!) (?<!{_DIGIT}!) (?!{_ALNUM}|=)
        | (?<=\#) (?<!{_ALNUM}\#) (?!{_ALNUM})
        | (?<=/) (?:(?<!{_LEFT}/) (?<!{_LEFT}[ ]/) | (?![ ]?{_RIGHT}))
        | (?<=\*) (?<!\*\*) (?:
            (?!\*) (?:(?<!{_LEFT}\*) (?<!{_LEFT}[ ]\*) | (?![ ]?{_RIGHT}))
            | (?<!{_ALNUM}\*) \*+
            | \*++ (?!{_ALNUM})
        )
    )""",
    re.VERBOSE,
)
SYMBOL = re.compile(rf"([{_SYMBOLS}{_SIGNS}](?:(?<=\*)\*+)?)")
LETTER = re.compile(f"[{_LETTERS}]")
WORD = re.compile(rf"[\w{_MARKS}{_SYMBOLS}{_SIGNS}]+")
LETTER_OR_WORD = re.compile(
    rf"[{_LETTERS}][{_MARKS}{_VOWELS}]*|(?:[^\W{_LETTERS}]|[{_MARKS}{_SYMBOLS}{_SIGNS}])+"
)
# Letters of an unspaced script that weigh as much as a word; Chinese and Japanese have about two in a word.
LETTERS_PER_WORD = {"THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4}
# Texts of a turn.
TEXTS = ("content", "reasoning", "tool_calls")
# A shorter text has too few word shingles: changing one word of seven moves the similarity of
# 3-shingles from 1 to 0.25. Its character shingles are compared instead.
SHORT = 8
CHARACTER_SHINGLE = 5
# Words of a shingle of a question.
QUESTION_SHINGLE = 3
# Least Jaccard similarity, 0 to 1, of two questions, or of two answers, that say the same.
ALIKE = 0.5
# Words of a passage that can be a question of its own.
PASSAGE = 4
Shingles = frozenset[str]
_ASCII = "".join(chr(c).lower() if WORD.match(chr(c)) else " " for c in range(128))


def canonical(text: str) -> str:
    """Reduce a text to its words and symbols: no case, punctuation, spacing or variant code points.

    Example:
        >>> canonical("Who  ARE you?"), canonical("abs(-5)"), canonical("C++"), canonical("你好")
        ('who are you', 'abs - 5', 'c + +', '你 好')
    """
    return " ".join(canonical_words(text))


def canonical_words(text: str) -> list[str]:
    """Return the words and symbols of the canonical form of a text."""
    is_ascii = text.isascii()
    if not is_ascii:
        text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(SYMBOL.split(PUNCTUATION.sub(" ", text)))
    if is_ascii:
        # Same result as below, several times as fast.
        return text.translate(_ASCII).split()
    return (LETTER_OR_WORD if LETTER.search(text) else WORD).findall(text)


def canonical_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the canonical text of turns, with their roles, reasoning and tool calls.

    Example:
        >>> canonical_messages([{"role": "user", "content": "Who are you?"}])
        'user who are you'
    """
    return " ".join(
        part
        for message in messages
        for part in (message["role"], *(canonical(message[key]) for key in TEXTS if message.get(key)))
        if part
    )


def is_short(text: str) -> bool:
    """Return whether a canonical text has fewer than `SHORT` words."""
    return text.count(" ") < SHORT - 1


class Form(NamedTuple):
    """A question in canonical form, with its words and shingles."""

    text: str
    words: Sequence[str]
    shingles: Shingles


def read_form(text: str) -> Form:
    """Return the form in which questions are compared.

    Example:
        >>> read_form("Who ARE you?")
        Form(text='who are you', words=['who', 'are', 'you'], shingles=frozenset({'who are you'}))
    """
    words = canonical_words(text)
    return Form(" ".join(words), words, shingles(words, QUESTION_SHINGLE))


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
    return frozenset(iterate_shingles(units, size))


def iterate_shingles(units: Sequence[str], size: int) -> Iterator[str]:
    """Yield the shingles in order, a repeated one again; see `shingles`."""
    if len(units) < size:
        return iter([" ".join(units)])
    return map(" ".join, zip(*(units[i:] for i in range(size)), strict=False))


def jaccard(a: Shingles, b: Shingles) -> float:
    """Return the exact Jaccard similarity of two non-empty shingle sets, 0 to 1.

    Example:
        >>> jaccard(shingles("ab", 1), shingles("bc", 1))
        0.3333333333333333
    """
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def containment(question: Set[object], known: Set[object]) -> float:
    """Return the share of a question's shingles that a text contains, 0 to 1; 0 for no shingles.

    Example:
        >>> containment(frozenset("ab"), frozenset("bc")), containment(frozenset(), frozenset("bc"))
        (0.5, 0)
    """
    return len(question & known) / len(question) if question else 0


def count_words(words: Sequence[str]) -> float:
    """Return the number of words of a canonical text; see `weight`."""
    return len(words) if all(map(str.isascii, words)) else sum(map(weight, words))


def weight(word: str) -> float:
    """Return how many words a word of a canonical text counts for: 1, or less for an unspaced script.

    Example:
        >>> weight("gold"), weight("金"), weight("ท")
        (1, 0.5, 0.25)
    """
    if word.isascii() or not LETTER.match(word):
        return 1
    return 1 / LETTERS_PER_WORD.get(unicodedata.name(word[0]).split()[0], 2)


def ngrams(words: Sequence[str], size: int) -> Iterator[str]:
    """Yield the runs of `size` words of a text in order; none if the text is shorter.

    Example:
        >>> list(ngrams(["a", "b", "c"], 2)), list(ngrams(["a"], 2)), list(ngrams(["金", "是", "b"], 1))
        (['a b', 'b c'], [], ['金 是', '是 b', 'b'])
    """
    if all(map(str.isascii, words)):
        yield from map(" ".join, zip(*(words[i:] for i in range(size)), strict=False))
        return
    weights = [weight(word) for word in words]
    stop, total = 0, 0.0
    for start in range(len(words)):
        while total < size and stop < len(words):
            total += weights[stop]
            stop += 1
        if total < size:
            return
        yield " ".join(words[start:stop])
        total -= weights[start]


def is_another_question(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether two prompts are the same but for one passage, which has nothing in common.

    Few questions about one document do not make it a template. Edits are scattered, or of few words.

    Example:
        >>> is_another_question("a b who is the king".split(), "a b when did it rain".split())
        True
        >>> is_another_question("a b who is the king".split(), "a b who was the king".split())
        False
    """
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    end = next((i for i, (a, b) in enumerate(zip(reversed(one), reversed(other), strict=False)) if a != b), 0)
    passages = [words[start : max(start, len(words) - end)] for words in (one, other)]
    if min(map(len, passages)) < PASSAGE:
        return False
    return jaccard(frozenset(passages[0]), frozenset(passages[1])) < ALIKE
