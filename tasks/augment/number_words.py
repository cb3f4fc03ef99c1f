"""Number words: English ones become digits ("fifty-first" is 51), others and quantities are kept."""

import re

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen""".split()  # noqa: SIM905 - prose
_ORDINAL_ONES = """zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth""".split()  # noqa: SIM905 - prose
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905 - prose
VALUES = (
    {word: value for value, word in enumerate(_ONES)}
    | {word: value for value, word in enumerate(_ORDINAL_ONES)}
    | {word: 10 * value for value, word in enumerate(_TENS, 2)}
    | {word[:-1] + "ieth": 10 * value for value, word in enumerate(_TENS, 2)}
)
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
SCALES |= {f"{word}th": value for word, value in SCALES.items()}
_WORD = "|".join(sorted([*VALUES, *SCALES], key=len, reverse=True))
PHRASE = re.compile(rf"\b(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*\b", re.IGNORECASE)
# "one" as a pronoun: "no one", "each one", "one another".
PRONOUN = re.compile(
    r"\b(no|any|every|some|each|which|this|that) one\b|\bone (another|of|can|must|may|should|might)\b",
    re.IGNORECASE,
)
PRONOUN_MARK = "\ue000"
# Quantities without digits, and the number words of German, French and Spanish: a paraphrase must keep
# each of them unchanged. An ambiguous word only makes the gate stricter.
QUANTITY = re.compile(
    r"\b(?:once|twice|thrice|half|halves|quarters?|doubled?|triple[ds]?|quadruple[ds]?|dozens?|scores?|pairs?|couple"
    r"|trillions?|"
    r"\w*(?:zwei|drei|vier|fünf|sechs|sieben|acht|neun|zehn|zwölf|zwanzig|dreißig|zig|hundert|tausend)|elf|"
    r"deux|trois|quatre|cinq|sept|huit|neuf|dix|onze|douze|treize|quatorze|quinze|seize|vingts?|trente|quarante|"
    r"cinquante|soixante|cents?|mille|milliards?|"
    r"dos|tres|cuatro|cinco|seis|siete|ocho|nueve|diez|doce|trece|catorce|quince|veinte|treinta|cuarenta|"
    r"cincuenta|sesenta|setenta|ochenta|noventa|cien|cientos?|mil|millones|milliarden?)\b",
    re.IGNORECASE,
)


def digits_for_words(text: str) -> str:
    """Replace the number words of an English text with digits.

    Example:
        >>> digits_for_words("The fifty-first of two hundred and six bones; no one left.")
        'The 51 of 206 bones; no one left.'
    """
    shielded = PRONOUN.sub(lambda found: re.sub("(?i)one", PRONOUN_MARK, found[0], count=1), text)
    return PHRASE.sub(lambda found: _digits(found[0]), shielded).replace(PRONOUN_MARK, "one")


def _digits(phrase: str) -> str:
    """Convert one phrase; words that do not form a single number become several.

    Example:
        >>> _digits("nineteen ninety"), _digits("one thousand and five"), _digits("three hundred million")
        ('19 90', '1005', '300000000')
    """
    numbers: list[int] = []
    total = current = last = 0
    started = False
    for word in re.findall(r"[a-z]+", phrase.casefold()):
        if word == "and":
            continue
        if word in SCALES:
            scale = SCALES[word]
            current = max(current, 1) * scale
            total, current = (total, current) if scale == 100 else (total + current, 0)
            last = scale
        else:
            value = VALUES[word]
            # "twenty one" is one number, "one twenty" and "nineteen ninety" are two.
            if started and not (last >= 100 or (last % 10 == 0 and last >= 20 and 0 < value < 10)):
                numbers.append(total + current)
                total = current = 0
            current += value
            last = value
        started = True
    return " ".join(str(number) for number in [*numbers, total + current])
