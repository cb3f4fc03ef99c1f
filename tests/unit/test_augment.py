"""Paraphrases: what the rules propose and what the quality check lets through."""

import pytest

from tasks.augment.__main__ import paraphrase, require_acceptance
from tasks.augment.quality import find_violation
from tasks.augment.rules import propose
from tasks.errors import DataError


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SOURCE = say("Who discovered Gallium?", "Gallium was discovered in 1875 by Lecoq, not by Moseley.")
VIOLATIONS = {
    "length_changed": say("Gallium?", "1875."),
    "number_changed": say("Tell me who discovered Gallium.", "Lecoq, not Moseley, found it in 1857."),
    "name_changed": say("Tell me who discovered Gallium.", "In 1875 Lecoq, not Mosely, found Gallium."),
    "negation_changed": say("Tell me who found Gallium.", "In 1875 Gallium was found by Lecoq or Moseley."),
    "copy_of_source": SOURCE,
}


@pytest.mark.parametrize(("reason", "candidate"), VIOLATIONS.items(), ids=VIOLATIONS.keys())
def test_each_violation_is_named(reason: str, candidate: list[dict[str, str]]) -> None:
    assert find_violation(SOURCE, candidate, [], 0.8) == reason


def test_a_faithful_rewording_passes_once_and_not_twice() -> None:
    good = say("Tell me who found Gallium.", "It was Lecoq, not Moseley, who found Gallium in 1875.")
    assert find_violation(SOURCE, good, [], 0.8) is None
    assert find_violation(SOURCE, good, [good], 0.8) == "copy_of_sibling"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What is the symbol of Gold?", "The symbol of Gold is Au.",
         ["Tell me what the symbol of Gold is.", "Au is the symbol of Gold."]),
        ("In which year was Tin found?", "Tin was discovered in 1900.",
         ["Tell me in which year Tin was found.", "It was in 1900 that Tin was discovered."]),
        ("Where does the name Tin come from?", "Latin.",
         ["Tell me where the name Tin comes from.", "Latin."]),
        ("Hello there", "Hi", ["Hello there", "Hi"]),
    ],
)  # fmt: skip
def test_the_rules_reword_questions_and_answers(question: str, answer: str, expected: list[str]) -> None:
    ((_, messages),) = propose(say(question, answer), 1)
    assert [m["content"] for m in messages] == expected


def test_a_paraphrase_stays_in_its_parents_group_and_is_never_padded() -> None:
    example = {"id": "p", "group_id": "g", "source": "s", "messages": say("Hello there", "Hi")}
    assert paraphrase(example, 3, 0.8)[0] == []
    example["messages"] = say("Who discovered Tin?", "Tin was discovered by Ann.")
    accepted, _ = paraphrase(example, 3, 0.8)
    assert [row["ordinal"] for row in accepted] == list(range(1, len(accepted) + 1))
    assert {(row["group_id"], row["parent_id"]) for row in accepted} == {("g", "p")}
    assert len({row["id"] for row in accepted} | {"p"}) == len(accepted) + 1


def test_too_few_accepted_paraphrases_fail_the_stage() -> None:
    require_acceptance(5, 5, 0.5)
    with pytest.raises(DataError, match="4 of 10 paraphrases passed"):
        require_acceptance(4, 6, 0.5)
