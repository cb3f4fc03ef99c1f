"""Personal data and secret keys in a text: found by pattern, confirmed by checksum or standard library.

Rules find data with a fixed form. Names and places have none: see `tasks.ingest.presidio`.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nightshift.raw.checksums import card_length, iban_length

PHONE_DIGITS = range(8, 16)
EMAIL = re.compile(r"[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}")
# What precedes a number is checked after its first character: a pattern that begins with a set of characters
# is found several times as fast.
IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d\d(?: ?[A-Z0-9]){11,30}")
CARD = re.compile(r"[2-6](?<![\d.].)(?:[ -]?\d){12,18}(?!\d)")
IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w]|\.\d)")
IPV6 = re.compile(r"[23](?<![\w:].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])")
# Country code after +; trunk 0 or area code in brackets, with separators; North America. Eight bare
# digits are an order number as often as a phone number.
PHONE = re.compile(
    r"[+(02-9](?<![\w+].)(?<!\d[ .,].)(?:"
    r"(?<=\+)\d(?:[ ()./-]{0,2}\d){7,14}"
    r"|(?<=\()0?\d{2,4}\)[ /-]{0,2}\d{2,4}(?:[ .-]?\d{2,4}){1,3}"
    r"|(?<=0)[1-9]\d{1,3}[ /.-]\d{2,4}(?:[ .-]\d{2,4}){1,3}"
    r"|(?<=0)[1-9](?:[ .-]\d\d){4}"
    r"|(?<=[2-9])\d\d[.-]\d{3}[.-]\d{4}"
    r")(?![\w])"
)
KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|\Z)"
    r"|(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36,255}"
    r"|github_pat_\w{22,255}"
    r"|glpat-[\w-]{20,64}"
    r"|sk-[\w-]{20,255}"
    r"|hf_[A-Za-z0-9]{30,64}"
    r"|AIza[\w-]{35}"
    r"|xox[abprs]-[\w-]{10,255}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"
    r")"
)
KEY_HINTS = ("PRIVATE KEY", "AKIA", "ASIA", "gh", "glpat-", "sk-", "hf_", "AIza", "xox", "eyJ")
# Four digits with at most two other characters between them: without these no number rule can match.
DIGITS = re.compile(r"\d\D{0,2}\d\D{0,2}\d\D{0,2}\d")
Check = Callable[[re.Match[str]], int]


@dataclass(frozen=True, slots=True)
class Finding:
    """One match: kind, and first and last + 1 character in the text."""

    kind: str
    start: int
    end: int


Find = Callable[[str], list[Finding]]


def find_pii(text: str) -> list[Finding]:
    """Find personal data and secret keys, in text order, without overlaps.

    Example:
        >>> find_pii("Write to ada@example.org, not to 10.0.0.1")
        [Finding(kind='email', start=9, end=24)]
    """
    found: list[Finding] = []
    rest = text
    for kind, pattern, check in _rules(text):
        findings = [Finding(kind, start, end) for start, end in _scan(rest, pattern, check)]
        rest = _blank(rest, findings)
        found += findings
    return sorted(found, key=lambda finding: finding.start)


def redact(text: str, find: Find = find_pii) -> str:
    """Replace personal data with its kind in brackets until the rules find no more.

    Args:
        text: Text to redact.
        find: Detector for the first pass: the rules, or the rules and a model.

    Example:
        >>> redact("Pay to DE89 3704 0044 0532 0130 00 today")
        'Pay to [IBAN] today'
    """
    findings = find(text)
    while findings:
        for finding in reversed(findings):
            text = f"{text[: finding.start]}[{finding.kind.upper()}]{text[finding.end :]}"
        # Removing a finding can make the text after it match. A model is not asked again: it could take
        # a placeholder for a name.
        findings = find_pii(text)
    return text


def _rules(text: str) -> Iterator[tuple[str, re.Pattern[str], Check]]:
    """Yield the rules that can match, preselected by cheap checks; on overlap the first rule wins."""
    if any(map(text.__contains__, KEY_HINTS)):
        yield "key", KEY, _whole
    if "@" in text:
        yield "email", EMAIL, _whole
    if DIGITS.search(text):
        yield "iban", IBAN, lambda match: iban_length(match[0])
        yield "card", CARD, lambda match: card_length(match[0])
        yield "ip_address", IPV4, _ip_length
        yield "phone", PHONE, _phone_length
    if ":" in text and ("2" in text or "3" in text):
        yield "ip_address", IPV6, _ip_length


def _scan(text: str, pattern: re.Pattern[str], check: Check) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each match that passes its check, which returns its length."""
    position = 0
    while match := pattern.search(text, position):
        length = check(match)
        if length:
            yield match.start(), match.start() + length
        position = match.start() + (length or 1)


def _blank(text: str, findings: list[Finding]) -> str:
    """Overwrite the findings, so that no other rule matches a part of them."""
    parts, position = [], 0
    for finding in findings:
        parts += [text[position : finding.start], "\0" * (finding.end - finding.start)]
        position = finding.end
    return "".join([*parts, text[position:]])


def _whole(match: re.Match[str]) -> int:
    """Accept the whole match."""
    return match.end() - match.start()


def _ip_length(match: re.Match[str]) -> int:
    """Accept a public address; return 0 for private, reserved and invalid ones."""
    try:
        address = ipaddress.ip_address(match[0].rstrip(":"))
    except ValueError:
        return 0
    return len(match[0].rstrip(":")) if address.is_global and not address.is_multicast else 0


def _phone_length(match: re.Match[str]) -> int:
    """Accept 8 to 15 digits, the range of E.164."""
    digits = sum(sign.isdigit() for sign in match[0])
    return _whole(match) if digits in PHONE_DIGITS else 0
