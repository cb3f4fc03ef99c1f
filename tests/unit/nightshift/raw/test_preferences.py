"""Rows that compare or rate answers are refused, or trained on the good answers only."""

from typing import Any

import pytest

from nightshift.raw.convert import convert, find_answers
from nightshift.raw.faults import RowError
from nightshift.raw.options import SourceOptions

CHOSEN = SourceOptions(preference="chosen")
COMPARE = SourceOptions(preference="compare")
PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
BAD = [PAIR[0], {"role": "assistant", "content": "Hm"}]
HELLO = [("user", "Hi"), ("assistant", "Ho")]
COMPARED: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"},
    {"question": "Hi", "chosen": "Ho", "rejected": "Hm"},
    {"instruction": "Hi", "input": "", "chosen": "Ho", "rejected": "Hm"},
    {"prompt": "Hi", "chosen_response": "Ho", "rejected_response": "Hm"},
    {"prompt": PAIR[:1], "chosen": PAIR[1:], "rejected": BAD[1:]},
    {"prompt": "Hi", "chosen": PAIR, "rejected": BAD},
    {"prompt": "Hi", "messages": BAD, "chosen": PAIR, "rejected": BAD},
    {"chosen": PAIR, "rejected": BAD},
    {"chosen_messages": PAIR, "rejected_messages": BAD},
    {"messages": PAIR[:1], "chosen": "Ho", "rejected": "Hm"},
    {"conversations": PAIR[:1], "chosen": PAIR[1], "rejected": BAD[1]},
    {"messages": PAIR, "rejected": "Hm"},
    {"messages": PAIR, "label": True},
    {"messages": PAIR, "kto_tag": "true"},
    {"prompt": "Hi", "completion": "Ho", "label": 1},
    {"question": "Hi", "answer": "Ho", "is_correct": True},
    {"prompt": "Hi", "response": "Ho", "is_safe": True},
    {"messages": PAIR, "resolved": True},
    {"prompt": "Hi", "response": "Ho", "helpfulness": 4},
    {"prompt": "Hi", "response": "Ho", "rating": "4.5"},
    {"prompt": "Hi", "response": "Ho", "scores": {"a": 1}},
]


@pytest.mark.parametrize("row", COMPARED)
def test_a_comparison_is_refused_or_trained_as_chosen(row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        convert(row)
    assert caught.value.reason == "preference"
    assert "preference: chosen" in caught.value.remedy
    assert [(turn.role, turn.content) for turn in convert(row, CHOSEN).turns] == HELLO


@pytest.mark.parametrize("label", [False, 0, -1, 0.0, "false", "Rejected"])
def test_a_bad_answer_is_never_trained(label: object) -> None:
    for options, reason in ((SourceOptions(), "preference"), (CHOSEN, "rejected_answer")):
        with pytest.raises(RowError, match=reason):
            convert({"messages": PAIR, "label": label}, options)


def test_a_label_of_unknown_meaning_is_a_fault_and_a_topic_is_none() -> None:
    with pytest.raises(RowError, match="unsupported_weight"):
        convert({"messages": PAIR, "label": 3}, CHOSEN)
    assert convert({"messages": PAIR, "label": "math"}).ignored == {"label"}
    assert convert({"messages": PAIR, "score": None, "rating": "high"}).ignored == {"rating"}


def test_chosen_text_without_its_question_is_a_fault() -> None:
    with pytest.raises(RowError, match="unknown_format"):
        convert({"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "Hm"}, CHOSEN)


@pytest.mark.parametrize("column", ["label", "sentiment", "summary", "answer", "target"])
def test_text_with_a_label_is_no_document(column: str) -> None:
    with pytest.raises(RowError, match="labelled_text"):
        convert({"text": "Great!", column: 1}, CHOSEN)


def test_text_may_have_a_score() -> None:
    assert convert({"text": "Great!", "score": 3.5}).ignored == {"score"}


def read(row: dict[str, Any], answer: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in convert(row, COMPARE, answer).turns]


@pytest.mark.parametrize("row", COMPARED[:12])
def test_a_pair_is_read_with_either_answer(row: dict[str, Any]) -> None:
    assert find_answers(row, COMPARE) == ["good", "bad"]
    assert read(row, "good") == HELLO
    assert read(row, "bad") == [("user", "Hi"), ("assistant", "Hm")]


@pytest.mark.parametrize("row", COMPARED[12:18])
def test_a_label_says_which_answer_a_row_has(row: dict[str, Any]) -> None:
    assert find_answers(row, COMPARE) == ["good"]
    assert read(row, "good") == HELLO
    (label,) = row.keys() & {"label", "kto_tag", "is_correct", "is_safe", "resolved"}
    bad = row | {label: False}
    assert find_answers(bad, COMPARE) == ["bad"]
    assert read(bad, "bad") == HELLO
    with pytest.raises(RowError, match="rejected_answer"):
        convert(bad, COMPARE)


@pytest.mark.parametrize("row", COMPARED[18:])
def test_a_number_compares_nothing(row: dict[str, Any]) -> None:
    assert find_answers(row, COMPARE) == []
    with pytest.raises(RowError, match="rated"):
        convert(row, COMPARE)


def test_a_row_without_comparison_and_a_source_that_compares_nothing_have_no_answers() -> None:
    assert find_answers({"prompt": "Hi", "completion": "Ho"}, COMPARE) == []
    assert find_answers({"text": "Once", "label": False}, COMPARE) == []
    assert find_answers(COMPARED[0], CHOSEN) == []
    assert read({"prompt": "Hi", "completion": "Ho"}, "good") == HELLO
