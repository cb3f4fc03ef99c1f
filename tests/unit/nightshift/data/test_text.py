"""Canonical text: what makes two texts the same, and what keeps them apart."""

import re
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.data.text import canonical, ngrams, weight


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who  ARE you?", "who are you"),
        ("It is well-known: yes, really!", "It is well known; yes really."),
        ("**Yes**, `gold` is _heavy_", "Yes gold is _heavy_"),
        ("# Heading\ntext", "Heading text"),
        ("Caf\u00e9", "Cafe\u0301"),
        ("\uff21\uff22", "ab"),
        ("\u201cDon\u2019t\u201d", "don t"),
        ("你好,世界!", "你好世界"),
        ("Straße", "STRASSE"),
    ],
)
def test_case_punctuation_spacing_and_markdown_do_not_count(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("abs(-5)", "abs(5)"),
        ("7 - 3", "7 3"),
        ("7 + 3", "7 * 3"),
        ("6/2", "6*2"),
        ("2**3", "2*3"),
        ("x > 5", "x < 5"),
        ("a == b", "a != b"),
        ("a && b", "a || b"),
        ("!done", "done"),
        ("5!", "5"),
        ("C++", "C"),
        ("C#", "C"),
        ("#tag", "tag"),
        ("$5", "5"),
        ("€5", "£5"),
        ("50 %", "50"),
        ("a^2", "a2"),
        ("[1, 2]", "{1, 2}"),
        ("√2", "2"),
        ("¬p", "p"),
        ("good 😀", "good 😡"),
        ("किताब", "कतब"),
        ("r\u00e9sum\u00e9", "resume"),
        ("שָׁלוֹם", "שלום"),
        ("ทำ", "ทา"),
    ],
)
def test_symbols_accents_and_vowel_signs_count(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


def test_letters_of_unspaced_scripts_are_words() -> None:
    assert canonical("金 gold金属です。ที่นี่") == "金 gold 金 属 で す ที่ นี่"
    assert canonical("한국어 문장") == "한국어 문장"


def test_ascii_text_gives_the_same_with_and_without_other_letters() -> None:
    text = "If x-1 > 3! then #5 (a*b)/c, **bold** {y} = f[0] & g | 50% of $3 @me ~z ^ C++ 2**3 !ok"
    assert canonical(text + " é") == canonical(text) + " é"


def is_symbol(sign: re.Match[str]) -> bool:
    """Return whether a sign of a text is a symbol, by what is before and after it."""
    text, start, stop = sign.string, sign.start(), sign.end()
    before, after = text[max(0, start - 2) : start], text[stop : stop + 2]
    match sign[0]:
        case "-":
            return after.lstrip(" ")[:1].isdigit()
        case "!":
            return after[:1].isalnum() or after[:1] == "=" or before[-1:].isdigit()
        case "#":
            return after[:1].isalnum() or before[-1:].isalnum()
        case "/" | "*":
            left, right = before.rstrip(" ")[-1:], after.lstrip(" ")[:1]
            return (left.isalnum() or left in (")", "]")) and (right.isalnum() or right in ("(", "["))
        case _:
            return before[-1:].isalnum() and after[:1].isalnum()


@settings(max_examples=1000)
@given(st.text(alphabet="aé5٣፭_ ()[]-!#/*=+.\n", max_size=12))
def test_a_sign_is_a_symbol_or_punctuation_by_its_neighbours(text: str) -> None:
    signs = re.compile(r"\*+|[#/!-]")
    plain = signs.sub(lambda sign: f" {sign[0]} " if is_symbol(sign) else ".", text)
    symbols = [word for word in canonical(text).split() if signs.fullmatch(word)]
    assert symbols == signs.findall(plain)


def test_a_minus_before_any_digit_is_a_symbol() -> None:
    digits = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isdigit()]
    # The normal form of some begins with a bracket: (1).
    digits = [digit for digit in digits if unicodedata.normalize("NFKC", digit)[0] != "("]
    assert len(digits) > 700
    assert [digit for digit in digits if not canonical(f"-{digit}").startswith("- ")] == []


def test_an_ngram_of_letters_has_as_much_text_as_one_of_words() -> None:
    assert [len(gram.split()) for gram in ngrams(list("金属是什么东西呢请告诉我"), 5)] == [10, 10, 10]
    assert [len(gram.split()) for gram in ngrams(["ก"] * 21, 5)] == [20, 20]
    assert weight("gold") == 1
