"""Checksums of account and card numbers: ISO 13616 (IBAN, mod 97) and ISO/IEC 7812 (Luhn)."""

import re
from collections.abc import Callable

# IBAN length in characters -> countries; source: SWIFT IBAN Registry.
COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
IBAN_LENGTHS = {country: length for length, names in COUNTRIES.items() for country in names.split()}
# Prefixes and lengths of the large card networks.
CARD_NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"
    r"|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11,16}|35(?:2[89]|[3-8]\d)\d{12,15}"
    r"|6(?:011|5\d\d|4[4-9]\d|2\d\d)\d{12,15}"
)


def iban_length(text: str) -> int:
    """Return the number of leading characters that form a valid IBAN, 0 for none.

    Example:
        >>> iban_length("DE89 3704 0044 0532 0130 00 TODAY"), iban_length("DE88370400440532013000")
        (27, 0)
    """
    need = IBAN_LENGTHS.get(text[:2], 0)
    length = _length_with(text, need, str.isalnum)
    number = text[:length].replace(" ", "")
    if not length or text[length : length + 1].isalnum():
        return 0
    digits = "".join(str(int(sign, 36)) for sign in number[4:] + number[:4])
    return length if int(digits) % 97 == 1 else 0


def card_length(text: str) -> int:
    """Return how many leading digits, spaces and hyphens form a valid card number, 0 for none.

    Example:
        >>> card_length("4111 1111 1111 1111 123"), card_length("4111111111111112")
        (19, 0)
    """
    for count in range(19, 12, -1):
        length = _length_with(text, count, str.isdigit)
        digits = re.sub(r"\D", "", text[:length])
        ends = length and not text[length : length + 1].isdigit()
        if ends and CARD_NETWORKS.fullmatch(digits) and is_luhn(digits):
            return length
    return 0


def is_luhn(digits: str) -> bool:
    """Return whether a number passes the Luhn check.

    Example:
        >>> is_luhn("79927398713"), is_luhn("79927398710")
        (True, False)
    """
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    rest = [int(digit) for digit in digits[-1::-2]]
    return (sum(rest) + sum(number - 9 if number > 9 else number for number in doubled)) % 10 == 0


def _length_with(text: str, count: int, counts: Callable[[str], bool]) -> int:
    """Return the length of the shortest prefix with `count` matching characters, 0 for fewer."""
    if not count:
        return 0
    for length, sign in enumerate(text, start=1):
        count -= counts(sign)
        if not count:
            return length
    return 0
