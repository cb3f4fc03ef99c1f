"""The quality check of paraphrases: nothing a reader could check may change.

Checks run in order of cost and each names the violation. Numbers and names must survive exactly,
because a fluent paraphrase with a wrong year is worse than none.
"""

import re
from collections import Counter
from collections.abc import Sequence

from tasks.augment.rules import Messages
from tasks.text import canonical_messages, jaccard, shingles

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
NAME = re.compile(r"\b[A-Z][\w'.-]*")
NEGATION = re.compile(r"\b(?:no|not|never|none|nobody|nothing|neither|nor|cannot|\w+n't)\b", re.I)
# Capitalised only because they begin a sentence.
FUNCTION_WORDS = frozenset(
    """a an and are at but by can did do does explain for from how i if in is it of on or please say
    tell that the there they this to was we were what when where which who why would you""".split()  # noqa: SIM905 - prose
)
SHINGLE_SIZE = 3


def find_violation(
    source: Messages, candidate: Messages, siblings: Sequence[Messages], max_similarity: float
) -> str | None:
    """Name the first thing wrong with a paraphrase, or None.

    Args:
        source: The original conversation.
        candidate: The paraphrase.
        siblings: Paraphrases of the same source that were accepted already.
        max_similarity: Shingle Jaccard, 0 to 1, from which two texts count as copies.

    Example:
        >>> say = lambda text: [{"role": "assistant", "content": text}]
        >>> find_violation(say("Found in 1875 by Lecoq."), say("Lecoq found it in 1857."), [], 0.8)
        'number_changed'
    """
    before, after = _text(source), _text(candidate)
    if not 0.5 <= len(after) / len(before) <= 2.0:
        return "length_changed"
    if Counter(NUMBER.findall(before)) != Counter(NUMBER.findall(after)):
        return "number_changed"
    if _names(before) != _names(after):
        return "name_changed"
    if len(NEGATION.findall(before)) != len(NEGATION.findall(after)):
        return "negation_changed"
    new = shingles(canonical_messages(candidate), SHINGLE_SIZE)
    for other, reason in [(source, "copy_of_source"), *((s, "copy_of_sibling") for s in siblings)]:
        if jaccard(new, shingles(canonical_messages(other), SHINGLE_SIZE)) >= max_similarity:
            return reason
    return None


def _text(messages: Messages) -> str:
    return "\n".join(m["content"] for m in messages)


def _names(text: str) -> set[str]:
    """Capitalised words that do not merely open a sentence.

    Example:
        >>> sorted(_names("The symbol of Gold is Au."))
        ['Au', 'Gold']
    """
    return {word.rstrip(".") for word in NAME.findall(text) if word.casefold() not in FUNCTION_WORDS}
