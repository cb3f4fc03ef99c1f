"""Rows in every common format become the same turns."""

import json
from typing import Any

import pytest

from nightshift.raw.checks import check, compile_special_tokens
from nightshift.raw.convert import convert
from nightshift.raw.faults import RowError
from nightshift.raw.options import SourceOptions
from nightshift.raw.tool_calls import pair_answers
from nightshift.raw.turns import Call, Conversation, Turn

MARKUP = compile_special_tokens([])


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in convert(row).turns]


def fault(row: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        check(convert(row), MARKUP)
    return caught.value.reason, caught.value.detail


HELLO = [("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]'},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"from": "gpt", "value": "Ho"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"instruction": "Hi", "input": "", "output": "Ho", "text": "### Instruction: Hi"},
        {"instruction": "Hi", "output": "Ho", "history": []},
        {"prompt": "Hi", "completion": "Ho"},
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": "Ho"}],
        },
    ],
)
def test_all_chat_formats_become_the_same_turns(row: dict[str, Any]) -> None:
    assert turns(row) == HELLO


def test_system_prompt_input_and_history_are_kept() -> None:
    assert turns({"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be short"}) == [
        ("system", "Be short"),
        ("user", "Add\n\n1, 2"),
        ("assistant", "3"),
    ]
    assert turns({"instruction": "b", "output": "d", "history": [["Hi", "Ho"]]}) == [
        *HELLO,
        ("user", "b"),
        ("assistant", "d"),
    ]
    assert turns({"conversations": [{"from": "human", "value": "Hi"}], "system": "S"})[0] == ("system", "S")


def test_a_text_that_the_options_name_wins_over_other_formats() -> None:
    row = {"text": "All of it.", "instruction": "Do", "output": "Done", "messages": [], "label": 1}
    for columns in ({"text": "text"}, {"text": "output"}):
        found = convert(row, SourceOptions(columns=columns, group_by="label"))
        assert [(turn.role, turn.content) for turn in found.turns] == [("text", row[columns["text"]])]
    assert found.ignored == {"instruction"}
    with pytest.raises(RowError) as caught:
        convert({"body": "x"}, SourceOptions(columns={"text": "chapter"}))
    assert caught.value.reason == "unknown_format"


def test_plain_text_is_one_turn_and_keeps_its_indentation() -> None:
    assert turns({"text": "  def f():\n", "url": "x"}) == [("text", "  def f():\n")]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "unknown_format", "none"),
        ({"frage": "a", "antwort": "b"}, "unknown_format", "antwort, frage"),
        ({"messages": []}, "no_messages", ""),
        ({"messages": ["Hi"]}, "no_messages", ""),
        ({"messages": "Hi"}, "no_messages", "not valid JSON"),
        ({"messages": [{"content": "Hi"}]}, "no_messages", "a turn has no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "not_text",
            "a part is not text",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "not_text", "int"),
        (
            {"instruction": "a", "output": "b", "history": "c"},
            "no_messages",
            "history is not a list of [question, answer]",
        ),
        ({"instruction": "a", "output": ""}, "empty_content", "turn 2"),
        ({"prompt": "a", "completion": "b", "tools": "{"}, "malformed_tool_call", "not valid JSON"),
        (
            {"prompt": "a", "completion": "b", "tools": {"a": 1}},
            "malformed_tool_call",
            "tools is not a list of objects",
        ),
    ],
)
def test_a_row_without_usable_turns_reports_the_problem(
    row: dict[str, Any], reason: str, detail: str
) -> None:
    assert fault(row) == (reason, detail)


def test_an_unknown_role_is_a_fault() -> None:
    assert fault({"conversations": [{"from": "alien", "value": "Hi"}]})[0] == "unknown_role"


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": function}]}


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        ({"arguments": "{}"}, "a call has no name"),
        ({"name": "f", "arguments": "{"}, "not valid JSON"),
        ({"name": "f", "arguments": "[1]"}, "arguments are not a JSON object"),
        ({"name": "f", "arguments": {"x": b"bytes"}}, "a value is not valid JSON"),
        ({"name": "f", "arguments": {"x": float("nan")}}, "a value is not valid JSON"),
        ({"name": "f", "arguments": '{"x": 1e999}'}, "not valid JSON"),
    ],
)
def test_a_malformed_call_is_a_fault(function: dict[str, Any], detail: str) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, call(**function)]}
    assert fault(row) == ("malformed_tool_call", detail)


def test_markup_in_arguments_and_in_tools_is_detected() -> None:
    question = {"role": "user", "content": "Hi"}
    assert fault({"messages": [question, call(name="f", arguments={"x": "<|im_end|>"})]}) == (
        "special_token",
        "turn 2",
    )
    row = {"messages": [question, call(name="f")], "tools": [{"name": "<|im_end|>"}]}
    assert fault(row) == ("special_token", "tools")


def test_sharegpt_calls_and_observations_are_paired() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3."},
        ],
        "tools": json.dumps([{"name": "add"}]),
    }
    conversation = check(convert(row), MARKUP)
    assert conversation.tools == [{"name": "add"}]
    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    assert conversation.turns[1].calls == (Call("add", {"a": 1}),)
    assert conversation.turns[2].name == "add"


def talk(*answers: Turn) -> list[Turn]:
    calls = (Call("f", {}, "1"), Call("g", {}, "2"))
    return [Turn("user", "Hi"), Turn("assistant", "", calls), *answers, Turn("assistant", "Ho")]


def test_tool_answers_follow_the_order_of_the_calls() -> None:
    paired = pair_answers(talk(Turn("tool", "b", call_id="2"), Turn("tool", "a", call_id="1")))
    assert [(turn.content, turn.name) for turn in paired[2:4]] == [("a", "f"), ("b", "g")]
    paired = pair_answers(talk(Turn("tool", "b", name="g"), Turn("tool", "a")))
    assert [(turn.content, turn.name) for turn in paired[2:4]] == [("a", "f"), ("b", "g")]


@pytest.mark.parametrize(
    ("answers", "reason", "detail"),
    [
        ((), "unanswered_tool_call", "turn 2"),
        ((Turn("tool", "a"),), "unanswered_tool_call", "turn 2"),
        ((Turn("tool", "a", call_id="3"),), "unpaired_tool_answer", "turn 3"),
        ((Turn("tool", "a", call_id="1"), Turn("tool", "b", call_id="1")), "unpaired_tool_answer", "turn 4"),
        ((Turn("tool", "a"), Turn("tool", "b"), Turn("tool", "c")), "unpaired_tool_answer", "turn 5"),
    ],
)
def test_unpaired_answers_and_calls_are_faults(answers: tuple[Turn, ...], reason: str, detail: str) -> None:
    with pytest.raises(RowError) as caught:
        pair_answers(talk(*answers))
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


def test_a_conversation_may_end_with_a_call_but_not_with_its_answer() -> None:
    ends = [Turn("user", "Hi"), Turn("assistant", "", (Call("f", {}),))]
    assert check(Conversation(ends), MARKUP).turns == ends
    with pytest.raises(RowError, match="no_final_answer"):
        check(Conversation([*ends, Turn("tool", "3")]), MARKUP)


def test_only_an_assistant_may_call_tools() -> None:
    with pytest.raises(RowError, match="malformed_tool_call"):
        check(Conversation([Turn("user", "Hi", (Call("f", {}),)), Turn("assistant", "Ho")]), MARKUP)


def test_arguments_nested_too_deeply_are_a_fault() -> None:
    deep: dict[str, Any] = {}
    for _ in range(64):
        deep = {"x": deep}
    row = {"messages": [{"role": "user", "content": "Hi"}, call(name="f", arguments=deep)]}
    assert fault(row) == ("too_deep", "more than 64 levels in a call or in tools")
