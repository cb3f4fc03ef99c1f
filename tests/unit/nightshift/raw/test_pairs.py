"""Questions and answers in columns: read if there is one way to read them, and mapped if there is not."""

from typing import Any

import pytest

from nightshift.raw.convert import convert
from nightshift.raw.faults import RowError
from nightshift.raw.options import SourceOptions


def read(row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in convert(row, SourceOptions(**options)).turns]


def fault(row: dict[str, Any], **options: Any) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        read(row, **options)
    return caught.value.reason, caught.value.detail


HELLO = [("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize("answer", ["output", "response", "completion", "answer", "solution", "target"])
@pytest.mark.parametrize(
    "question", ["instruction", "prompt", "question", "query", "problem", "input", "Prompt"]
)
def test_one_question_and_one_answer_are_read(question: str, answer: str) -> None:
    assert read({question: "Hi", answer: "Ho"}) == HELLO


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"question": "a", "query": "b", "answer": "c"}, "ambiguous_columns", "question, query"),
        ({"question": "a", "answer": "b", "response": "c"}, "ambiguous_columns", "response, answer"),
        ({"instruction": "a", "question": "b", "answer": "c"}, "ambiguous_columns", "instruction, question"),
        ({"question": "a", "options": ["b"], "answer": "c"}, "choices", "column options"),
        ({"instruction": "a", "output": "b", "revision": "c"}, "revised", "column revision"),
        ({"question": "a", "answers": ["b", "c"]}, "ambiguous_columns", "2 answers"),
        ({"question": "a", "answer": float("nan")}, "not_text", "NaN"),
        ({"question": "a", "answer": float("inf")}, "not_text", "Infinity"),
        (
            {"prompt": "[{'role': 'user', 'content': 'a'}]", "completion": "b"},
            "no_messages",
            "not valid JSON",
        ),
        ({"question": "a", "reply": "b"}, "no_answer", "question, reply"),
        ({"reply": "b"}, "unknown_format", "reply"),
        ({"from": "human", "value": "Hi"}, "one_message", "from, value"),
    ],
)
def test_what_could_be_read_in_two_ways_is_a_fault(row: dict[str, Any], reason: str, detail: str) -> None:
    assert fault(row) == (reason, detail)


def test_an_empty_column_makes_nothing_ambiguous() -> None:
    assert read({"question": "Hi", "answer": "Ho", "response": "", "query": None}) == HELLO


def test_contexts_belong_to_the_question() -> None:
    row = {"instruction": "Sum?", "input": "2", "context": "3", "passages": ["4", "5"], "response": "14"}
    assert read(row) == [("user", "Sum?\n\n2\n\n3\n\n4\n\n5"), ("assistant", "14")]


def test_text_keeps_its_outer_spaces() -> None:
    assert read({"prompt": "def f():\n", "completion": "    return 1\n"}) == [
        ("user", "def f():\n"),
        ("assistant", "    return 1\n"),
    ]


def test_columns_are_mapped_also_if_they_swap_their_names_or_are_nested() -> None:
    swapped = {"instruction": "output", "output": "instruction"}
    assert read({"instruction": "Ho", "output": "Hi"}, columns=swapped) == HELLO
    nested = {"question": "data.q", "answer": "data.a.text"}
    row = {"data": {"q": "Hi", "a": {"text": "Ho"}, "hint": "x"}, "answer": "wrong"}
    assert read(row, columns=nested) == HELLO
    assert convert(row, SourceOptions(columns=nested)).ignored == {"data.hint"}


def test_columns_that_are_not_read_are_reported_without_personal_data() -> None:
    row = {"question": "Hi", "answer": "Ho", "id": 0, "none": None, "empty": [], "ada@example.org": 1}
    assert convert(row).ignored == {"id", "[EMAIL]"}


def test_conversational_prompts_may_be_json_in_a_cell() -> None:
    row = {"prompt": '[{"role": "user", "content": "Hi"}]', "completion": '[{"from": "gpt", "value": "Ho"}]'}
    assert read(row) == HELLO
