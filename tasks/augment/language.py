"""Language and meta-text checks: the candidate keeps the language and does not mention the task."""

import re
import unicodedata
from collections import Counter

FUNCTION_WORDS = {
    "en": frozenset("the and of is was in to that it with for are by from this which".split()),  # noqa: SIM905
    "de": frozenset("der die das und ist war nicht ein eine von mit zu den auf wurde".split()),  # noqa: SIM905
    "fr": frozenset("le la les et est une des du dans que pour il elle par sur".split()),  # noqa: SIM905
    "es": frozenset("el los las y es una del en que por con para se su fue".split()),  # noqa: SIM905
}
META = re.compile(
    r"""^\s*(?:sure|certainly|of\ course|absolutely|okay|great\ question)\b\s*[,!.:]
    |\b(?:here|below)\ (?:is|are|'s)\ .{0,40}\b(?:paraphras|version|rewor|rewrit|rephras|alternativ)
    |\bas\ an?\ (?:ai|artificial\ intelligence|language\ model)\b
    |\b(?:paraphras|rephras|reword)(?:e|ed|es|ing)\b
    |\b(?:original|source|given)\ (?:text|conversation|message|sentence)s?\b
    |^\s*(?:version|variant|option|paraphrase)\ ?\d
    |\bI(?:'m|\ am)\ sorry,?\ but\b|\bI\ (?:cannot|can't|can\ not)\ (?:help|assist|comply)\b
    |<\|[^|]*\|>|\[/?INST\]|</?(?:think|answer|text|conversation)>""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
# Share of letters in another script above which the language counts as changed.
MAX_SCRIPT_SHIFT = 0.2
# Function words needed to identify a language.
MIN_FUNCTION_WORDS = 3


def has_meta_text(source: str, candidate: str) -> bool:
    """Return whether a candidate mentions the task in words that the source does not contain.

    Example:
        >>> has_meta_text("Gold is Au.", "Sure! Here is a paraphrase: Au is gold.")
        True
    """
    known = {found[0].casefold() for found in META.finditer(source)}
    return any(found[0].casefold() not in known for found in META.finditer(candidate))


def language_differs(source: str, candidate: str) -> bool:
    """Return whether two texts differ in script, or in language if both are identified.

    Example:
        >>> language_differs("It is the name of a town.", "Es ist der Name von einer Stadt und nicht mehr.")
        True
    """
    before, after = _scripts(source), _scripts(candidate)
    moved = sum(abs(before[script] - after[script]) for script in {*before, *after}) / 2
    if moved > MAX_SCRIPT_SHIFT:
        return True
    languages = _language(source), _language(candidate)
    return None not in languages and languages[0] != languages[1]


def _scripts(text: str) -> Counter[str]:
    """Return the share of letters in each script: the first word of a letter's Unicode name."""
    counts = Counter(unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return Counter({script: count / counts.total() for script, count in counts.items()})


def _language(text: str) -> str | None:
    """Return the language with most function words in a text, or None if they are too few or tied."""
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    counts = {name: sum(words[word] for word in known) for name, known in FUNCTION_WORDS.items()}
    first, second = sorted(counts.values(), reverse=True)[:2]
    return (
        max(counts, key=lambda name: counts[name]) if first >= MIN_FUNCTION_WORDS and first > second else None
    )
