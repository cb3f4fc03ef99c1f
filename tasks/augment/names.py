"""Names and negations, which a paraphrase must keep in addition to its `tasks.augment.facts`.

A capitalised word inside a sentence is a name. At the start of a sentence, a word counts as a name
unless it is a common word. In doubt, the paraphrase is rejected.
"""

import re
from collections import Counter
from dataclasses import dataclass

WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?")
NEGATION = re.compile(
    r"\b(?:no|not|never|none|nobody|nothing|nowhere|neither|nor|cannot|without|unable|impossible|hardly|"
    r"\w+n['’]t"
    r"|nicht|kein\w*|nie|niemals|ohne|pas|jamais|aucune?|sans|nunca|jamás|ningun[oa]?|ningún)\b",
    re.IGNORECASE,
)
# Text before the first word of a sentence: nothing, an end mark, a colon or a bracket.
SENTENCE_START = re.compile(r"(?:^|[.!?:;…。]|\n)[\s\"'“”«»‘’()\[\]*#>•–—-]*$")
# A full stop after these does not end a sentence, unless the line ends too.
ABBREVIATION = re.compile(
    r"\b(?:Mrs?|Ms|Drs?|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Rev|Hon|Gov|Sen|Rep|No|vs|[A-Z])\. *\Z"
)
# Function words and verbs that start English sentences and are rarely names.
COMMON = frozenset(
    """a about according after again all almost also although always among an and another any are around as
    ask at be because before being below between both but by can certain compared consider could describe
    did discovered do does during each either even every everyone everything explain find finally first
    for formerly found from further generally give given had has have he her here his how however i i'm i'd
    i'll i've identify if in instead is it it's its just known last later let let's like list located made
    many may maybe me meanwhile might more moreover most much must my name named next no nobody none nor not
    nothing now of often on once one only or originally other our over people perhaps please previously
    provide regarding say several she should show since so some someone something sometimes speaking state
    such tell than thanks that that's the their them then there there's therefore these they they're this
    those though through thus to today together under unlike until up upon use used usually was we we're
    well were what what's when whenever where whereas whether which while who who's whom whose why will with
    within without would yes yet you you're you've your""".split()  # noqa: SIM905 - prose
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a text, and the words in which to look up another text's names.

    Attributes:
        inner: Capitalised words inside a sentence, and words with a capital after the first letter.
        openers: Words that start a sentence and are not common words.
        words: All words, as written.
        folded: All words, case-folded.
    """

    inner: Counter[str]
    openers: Counter[str]
    words: Counter[str]
    folded: frozenset[str]


def read_names(text: str) -> Names:
    """Extract the names of a text.

    Example:
        >>> names = read_names("Gallium was found by Lecoq. The symbol is Ga.")
        >>> sorted(names.inner), sorted(names.openers)
        (['Ga', 'Lecoq'], ['Gallium'])
    """
    inner: Counter[str] = Counter()
    openers: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for found in WORD.finditer(text):
        word = _without_possessive(found[0])
        words[word] += 1
        if word.islower() or (word.casefold() in ("i", "i'm", "i'd", "i'll", "i've") and _is_pronoun(found)):
            continue
        before = text[max(0, found.start() - 12) : found.start()]
        opens = SENTENCE_START.search(before) is not None and not ABBREVIATION.search(before)
        if not opens or (not word[1:].islower() and len(word) > 1):
            inner[word] += 1
        elif word.casefold() not in COMMON:
            openers[word] += 1
    return Names(inner, openers, words, frozenset(word.casefold() for word in words))


def names_differ(source: Names, candidate: Names) -> bool:
    """Return whether a name was lost, invented or replaced by another.

    A name may occur more often ("Gallium was found" for "it was found") or less often. It may not occur
    less often while another occurs more often: one may then have replaced the other. Two swapped names
    cannot be detected by counting.

    Example:
        >>> names_differ(read_names("Found by Lecoq."), read_names("Lecoq found it."))
        False
        >>> names_differ(read_names("Found by Lecoq."), read_names("Found by Lecog."))
        True
    """
    if _lacks_name(source, candidate) or _lacks_name(candidate, source):
        return True
    names = set(source.inner) | set(candidate.inner)
    names |= set(source.openers) & set(candidate.words) | set(candidate.openers) & set(source.words)
    change = [candidate.words[name] - source.words[name] for name in names if name.casefold() not in COMMON]
    return min(change, default=0) < 0 < max(change, default=0)


def count_negations(text: str) -> int:
    """Count the negation words of a text (English; the common ones of German, French and Spanish).

    Example:
        >>> count_negations("It isn't so, and never was.")
        2
    """
    return len(NEGATION.findall(text))


def _lacks_name(names: Names, other: Names) -> bool:
    """Return whether the other text lacks a name of this one.

    A name that is also a common word (the element symbols In, He, At) must stay inside a sentence:
    at its start it cannot be distinguished from the common word.
    """
    return (
        any(name not in other.words for name in names.inner)
        or any(name.casefold() not in other.folded for name in names.openers)
        or any(other.inner[name] < count for name, count in names.inner.items() if name.casefold() in COMMON)
    )


def _without_possessive(word: str) -> str:
    """Remove the English possessive ending."""
    return re.sub(r"['’]s$", "", word) if word[:1].isupper() else word


def _is_pronoun(found: re.Match[str]) -> bool:
    """Return whether "I" is followed by a word, like the pronoun, and not by the end of a sentence."""
    return re.match(r"['’]|\s+[a-z]", found.string[found.end() :]) is not None
