"""Properties of the quality gate: a changed number or name never passes."""

import random
import string
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.augment.quality import find_violation

PEOPLE = ("Lecoq", "Curie", "Ramsay", "Nilson", "Seaborg", "Klaproth", "Åkerman", "Dalton")
PLACES = ("Paris", "Berkeley", "London", "Uppsala", "Dubna", "Ytterby")
ELEMENTS = ("Gallium", "Radium", "Argon", "Scandium", "Plutonium", "Uranium")
# Pairs of a source and a faithful paraphrase with the same facts.
TEMPLATES = (
    (
        ("Who discovered {element}?",
         "{person} discovered {element} in {place} in {year}, in {grams} g of ore."),
        ("Tell me who found {element}.",
         "In {year}, {element} was found by {person} in {place}, in {grams} g of ore."),
    ),
    (
        ("When was {element} found?", "{element} was found in {year} in {place} by {person}, at {grams} °C."),
        ("Give me the year of {element}.",
         "It was in {place} that {person} found {element}, in {year}, at {grams} °C."),
    ),
)  # fmt: skip
CASES = st.tuples(
    st.sampled_from(TEMPLATES),
    st.sampled_from(PEOPLE),
    st.sampled_from(PLACES),
    st.sampled_from(ELEMENTS),
    st.integers(1500, 2020),
    st.integers(2, 9999),
)


def fill(templates: tuple[str, str], facts: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": template.format(**facts)}
        for role, template in zip(("user", "assistant"), templates, strict=True)
    ]


def build(case: tuple[Any, ...]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    (source, candidate), person, place, element, year, grams = case
    facts = {"person": person, "place": place, "element": element, "year": year, "grams": grams}
    return fill(source, facts), fill(candidate, facts)


def mutate(text: str, spans: list[tuple[int, int]], alphabet: str, rng: random.Random) -> str:
    """Replace one character of one span."""
    start, end = rng.choice(spans)
    at = rng.randrange(start, end)
    new = rng.choice([c for c in alphabet if c.casefold() != text[at].casefold()])
    return text[:at] + (new.upper() if text[at].isupper() else new) + text[at + 1 :]


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_a_faithful_paraphrase_passes(case: tuple[Any, ...]) -> None:
    source, candidate = build(case)
    assert find_violation(source, candidate, "reword") is None


@settings(max_examples=1000, deadline=None)
@given(CASES, st.integers(0, 2**32), st.booleans())
def test_a_changed_digit_or_letter_of_a_name_is_always_detected(
    case: tuple[Any, ...],
    seed: int,
    digit: bool,  # noqa: FBT001
) -> None:
    source, candidate = build(case)
    rng = random.Random(seed)
    _, person, place, element, year, grams = case
    wanted = [str(year), str(grams)] if digit else [person, place, element]
    turn = candidate[1]
    text = turn["content"]
    spans = [(text.index(word), text.index(word) + len(word)) for word in wanted if word in text]
    turn["content"] = mutate(text, spans, string.digits if digit else string.ascii_lowercase, rng)
    assert turn["content"] != text
    assert find_violation(source, candidate, "reword") is not None
    assert find_violation(source, candidate, "reversed") is not None


@settings(max_examples=300, deadline=None)
@given(CASES, st.sampled_from(PEOPLE), st.sampled_from(PLACES), st.integers(1500, 2020))
def test_a_replaced_name_or_year_is_detected(
    case: tuple[Any, ...], person: str, place: str, year: int
) -> None:
    source, candidate = build(case)
    for old, new in ((case[1], person), (case[2], place), (str(case[4]), str(year))):
        changed = [{**turn, "content": turn["content"].replace(old, new)} for turn in candidate]
        if changed != candidate:
            assert find_violation(source, changed, "context_shift") is not None
