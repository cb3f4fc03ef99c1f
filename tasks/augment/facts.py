"""Checkable facts of a text: URLs, code, quoted strings, dates, numbers with their units.

Each kind is extracted as a multiset of normalised values, so that "1,000 km" equals "one thousand
kilometres" and "3 May 1990" equals "May 3, 1990". An unknown form stays as written: the two texts then
differ and the paraphrase is rejected, which is the safe outcome.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tasks.augment.number_words import QUANTITY, digits_for_words

URL = re.compile(r"(?:https?://|www\.)\S+|\b[\w.+-]+@[\w-]+\.[\w.-]+", re.IGNORECASE)
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
QUOTE = re.compile(r"\"[^\"\n]+\"|“[^”\n]+”|«[^»\n]+»|„[^“”\n]+[“”]")
MONTHS = "january february march april may june july august september october november december".split()  # noqa: SIM905 - prose
_MONTH = r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"  # noqa: E501 - one pattern
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
# Pattern -> groups of year, month and day (0: absent), the most complete form first.
DATES = (
    (re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b"), (1, 2, 3)),
    (re.compile(rf"\b{_DAY}(?: of)? {_MONTH},? (\d{{4}})\b", re.IGNORECASE), (3, 2, 1)),
    (re.compile(rf"\b{_MONTH} {_DAY},? (\d{{4}})\b", re.IGNORECASE), (3, 1, 2)),
    (re.compile(rf"\b{_MONTH},?(?: of)? (\d{{4}})\b", re.IGNORECASE), (2, 1, 0)),
    (re.compile(rf"\b{_DAY}(?: of)? {_MONTH}", re.IGNORECASE), (0, 2, 1)),
    (re.compile(rf"\b{_MONTH} {_DAY}\b(?![.,]\d)", re.IGNORECASE), (0, 1, 2)),
)
# Unit -> its spellings next to a number. Case matters only for symbols ("mW" is not "MW").
UNITS = {
    "%": "% percent",
    "°C": "°C celsius",
    "°F": "°F fahrenheit",
    "K": "K kelvin kelvins",
    "mm": "mm millimetre millimetres millimeter millimeters",
    "cm": "cm centimetre centimetres centimeter centimeters",
    "m": "m metre metres meter meters",
    "km": "km kilometre kilometres kilometer kilometers",
    "in": "inch inches",
    "ft": "ft foot feet",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms kilo kilos",
    "t": "t tonne tonnes ton tons",
    "lb": "lb lbs pound pounds",
    "ml": "ml mL millilitre millilitres milliliter milliliters",
    "l": "l L litre litres liter liters",
    "ms": "ms millisecond milliseconds",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "d": "day days",
    "wk": "week weeks",
    "mo": "month months",
    "yr": "yr yrs year years",
    "USD": "$ USD dollar dollars",
    "EUR": "€ EUR euro euros",
    "GBP": "£ GBP",
    "Hz": "Hz hertz",
    "kHz": "kHz kilohertz",
    "MHz": "MHz megahertz",
    "GHz": "GHz gigahertz",
    "W": "W watt watts",
    "kW": "kW kilowatt kilowatts",
    "MW": "MW megawatt megawatts",
    "V": "V volt volts",
    "J": "J joule joules",
    "kB": "kB kilobyte kilobytes",
    "MB": "MB megabyte megabytes",
    "GB": "GB gigabyte gigabytes",
    "TB": "TB terabyte terabytes",
}
UNIT_OF = {spelling: unit for unit, spellings in UNITS.items() for spelling in spellings.split()}
# A sign, a currency, digits with separators, and the following word or symbol. Superscripts,
# subscripts and fractions (¹ ₂ ½) are numbers too, but `\d` does not match them.
NUMBER = re.compile(
    r"(?P<currency>[$€£]\s?)?(?P<sign>(?<![\w.)\]])[-−+])?(?P<digits>\d+(?:[.,:/]\d+)*|[²³¹⁰-⁹₀-₉¼-¾⅐-⅞]+)"
    r"(?:(?:st|nd|rd|th)\b)?"
    r"(?:(?P<attached>[A-Za-zµ]+)|[ \u00a0\u202f-]?(?:degrees? )?(?P<unit>[%°]?[A-Za-z]+|%|[$€£]))?"
)
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)")


@dataclass(frozen=True, slots=True)
class Facts:
    """The checkable parts of a text, and the remaining text.

    Attributes:
        urls: URLs and email addresses.
        code: Code spans and code blocks, as written.
        quotes: Quoted strings, without quotation marks.
        dates: ISO 8601 dates; a missing day is left out, a missing year is `-`.
        numbers: Numbers with their units; quantities in words.
        rest: Text without the parts above, except numbers.
    """

    urls: Counter[str]
    code: Counter[str]
    quotes: Counter[str]
    dates: Counter[str]
    numbers: Counter[str]
    rest: str


def read_facts(text: str) -> Facts:
    """Extract the checkable parts of a text.

    Example:
        >>> facts = read_facts('On 3 May 1990 "Up" ran 1,000 km, see http://a.b/c.')
        >>> sorted(facts.dates + facts.quotes + facts.numbers + facts.urls)
        ['1000 km', '1990-05-03', 'Up', 'http://a.b/c']
        >>> read_facts("May 3rd, 1990: fifty-first").numbers == read_facts("1990-05-03: 51st").numbers
        True
    """
    code, text = _extract(CODE, text, lambda found: found[0])
    urls, text = _extract(URL, text, lambda found: found[0].rstrip(".,;:!?)]}'\""))
    quotes, text = _extract(QUOTE, text, lambda found: " ".join(found[0][1:-1].split()).rstrip(".,;!?"))
    text = digits_for_words(text)
    dates: Counter[str] = Counter()
    for pattern, groups in DATES:
        found, text = _extract(pattern, text, lambda match, groups=groups: _iso_date(match, groups))  # type: ignore[misc]
        dates += found
    numbers = Counter(_number(found) for found in NUMBER.finditer(text))
    numbers += Counter(word.casefold() for word in QUANTITY.findall(text))
    return Facts(urls, code, quotes, dates, numbers, text)


def find_changed_fact(source: Facts, candidate: Facts) -> str | None:
    """Return the first kind of fact that differs, or None.

    Example:
        >>> find_changed_fact(read_facts("in 1875"), read_facts("in 1857"))
        'number_changed'
    """
    kinds = (
        ("number_changed", source.numbers, candidate.numbers),
        ("date_changed", source.dates, candidate.dates),
        ("url_changed", source.urls, candidate.urls),
        ("code_changed", source.code, candidate.code),
        ("quote_changed", source.quotes, candidate.quotes),
    )
    return next((reason for reason, before, after in kinds if before != after), None)


def _extract(
    pattern: re.Pattern[str], text: str, normalise: Callable[[re.Match[str]], str]
) -> tuple[Counter[str], str]:
    """Return the normalised matches of a pattern, and the text without them."""
    return Counter(normalise(found) for found in pattern.finditer(text)), pattern.sub(" ", text)


def _iso_date(found: re.Match[str], groups: tuple[int, int, int]) -> str:
    """Format a date as ISO 8601; a missing year is `-`."""
    year, month, day = (found[group] if group else "" for group in groups)
    if not month.isdigit():
        number = next(i for i, name in enumerate(MONTHS, 1) if name.startswith(month[:3].casefold()))
        month = str(number)
    return "-".join([year or "-", month.zfill(2), *([day.zfill(2)] if day else [])])


def _number(found: re.Match[str]) -> str:
    """Format a number with its unit, without thousands separators and ordinal endings.

    Letters attached to the digits ("5G", "10mW") belong to the number, even if they are no known unit.
    """
    digits = found["digits"]
    if THOUSANDS.fullmatch(digits):
        digits = digits.replace(",", "")
    sign = "-" if found["sign"] in ("-", "−") else ""
    word = (found["currency"] or found["attached"] or found["unit"] or "").strip()
    spelled = UNIT_OF.get(word.casefold()) if len(word) > 3 else None
    unit = UNIT_OF.get(word) or spelled or found["attached"] or ""
    return f"{sign}{digits} {unit}".rstrip()
