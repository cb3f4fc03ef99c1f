"""Messages of every dialect become the same turns; their training flags are obeyed."""

from typing import Any

import pytest

from nightshift.raw.checks import check, compile_special_tokens
from nightshift.raw.convert import convert
from nightshift.raw.faults import RowError
from nightshift.raw.options import SourceOptions
from nightshift.raw.turns import Call, Conversation, Turn

MARKUP = compile_special_tokens([])
ASK = {"role": "user", "content": "Hi"}


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "Ho"} | keys


def read(*messages: dict[str, Any], **columns: Any) -> Conversation:
    return check(convert({"messages": list(messages), **columns}), MARKUP)


def fault(*messages: dict[str, Any], **columns: Any) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        read(*messages, **columns)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"loss_weight": 0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"loss_mask": 0},
        {"weight": 1, "train": False},
        {"content": [{"type": "text", "text": "Ho", "train": False}]},
        {"content": [{"type": "text", "text": "H", "weight": 0}, {"type": "text", "text": "o", "weight": 0}]},
    ],
)
def test_a_turn_that_is_not_to_be_trained_is_not(flag: dict[str, Any]) -> None:
    found = read(ASK, answer(**flag), ASK, answer())
    assert [turn.train for turn in found.turns if turn.role == "assistant"] == [False, True]
    assert not found.ignored
    assert fault(ASK, answer(**flag)) == ("no_supervised_token", "every assistant turn has the weight 0")


@pytest.mark.parametrize("flag", [{"weight": 1}, {"loss_weight": 1.0}, {"train": True}, {"weight": None}])
def test_a_turn_that_is_to_be_trained_is(flag: dict[str, Any]) -> None:
    assert read(ASK, answer(**flag)).turns == [Turn("user", "Hi"), Turn("assistant", "Ho")]


@pytest.mark.parametrize(
    ("flag", "reason", "detail"),
    [
        ({"weight": 0.5}, "unsupported_weight", "0.5, turn 2"),
        ({"loss_weight": 2}, "unsupported_weight", "2, turn 2"),
        ({"weight": float("nan")}, "unsupported_weight", "nan, turn 2"),
        ({"train": "no"}, "unsupported_weight", "str, turn 2"),
        ({"training_detail": [{"begin_offset": 0}]}, "partial_training", "turn 2"),
        ({"train_detail": [{"begin_offset": 0}]}, "partial_training", "turn 2"),
        ({"content": [{"text": "H", "train": False}, {"text": "o"}]}, "partial_training", "turn 2"),
    ],
)
def test_flags_that_cannot_be_obeyed_are_faults(flag: dict[str, Any], reason: str, detail: str) -> None:
    assert fault(ASK, answer(**flag)) == (reason, detail)


def test_a_row_may_have_a_flag_and_measurements() -> None:
    assert fault(ASK, answer(), weight=0) == ("no_supervised_token", "the row has the weight 0")
    assert fault(ASK, answer(), train=False) == ("no_supervised_token", "the row has the weight 0")
    assert fault(ASK, answer(), weight=0.3) == ("unsupported_weight", "0.3, the row")
    assert read(ASK, answer(), weight=1, loss=2.31).ignored == {"loss"}


def test_a_flag_of_a_user_turn_is_counted_if_it_asks_for_training() -> None:
    assert not read(ASK | {"loss_weight": 0}, answer()).ignored
    assert read(ASK | {"train": True}, answer()).ignored == {"messages: training flag of a user turn"}


@pytest.mark.parametrize(
    ("speaker", "role"),
    [("developer", "system"), ("Human", "user"), ("prompter", "user"), ("Chatbot", "assistant")],
)
def test_the_speakers_of_the_field_are_known(speaker: str, role: str) -> None:
    assert convert({"messages": [{"role": speaker, "content": "x"}]}).turns[0].role == role


def test_speakers_are_mapped_and_the_source_wins() -> None:
    options = SourceOptions(roles={"Kundin": "user", "bot": "user", "human": "assistant"})
    messages = [{"from": name, "value": "x"} for name in ("Kundin", "bot", "human", "gpt")]
    found = convert({"conversations": messages}, options)
    assert [turn.role for turn in found.turns] == ["user", "user", "assistant", "assistant"]


def test_a_refusal_is_an_answer() -> None:
    assert read(ASK, answer(content=None, refusal="No.")).turns[1].content == "No."
    assert read(ASK, answer(content=[{"type": "refusal", "refusal": "No."}])).turns[1].content == "No."
    assert read(ASK, answer(refusal="No.")).ignored == {"messages.refusal"}


def test_legacy_functions_are_tools_and_their_calls_are_calls() -> None:
    function = {"name": "f", "parameters": {}}
    found = read(
        ASK,
        answer(content=None, function_call={"name": "f", "arguments": '{"x": 1}'}),
        {"role": "function", "name": "f", "content": ""},
        answer(),
        functions=[function],
    )
    assert found.tools == [{"type": "function", "function": function}]
    assert found.turns[1].calls == (Call("f", {"x": 1}),)
    assert found.turns[2] == Turn("tool", "", name="f")
    assert not found.ignored


def test_several_answers_in_one_anthropic_message_are_several_turns() -> None:
    uses = [{"type": "tool_use", "id": name, "name": name, "input": {}} for name in ("f", "g")]
    results = [
        {"type": "tool_result", "tool_use_id": "g", "content": [{"type": "text", "text": "2"}]},
        {"type": "tool_result", "tool_use_id": "f", "content": "1"},
    ]
    found = read(ASK, answer(content=uses), {"role": "user", "content": results}, answer())
    assert [(turn.role, turn.content, turn.name) for turn in found.turns[2:4]] == [
        ("tool", "1", "f"),
        ("tool", "2", "g"),
    ]


@pytest.mark.parametrize(
    "text",
    ['<tool_call>{"name": "f"}</tool_call>', "<functioncall> {}", "[f(x=1)]", '[Get Rate(x="a"), g(y=[1])]'],
)
def test_answers_to_calls_in_the_text_are_kept(text: str) -> None:
    found = read(ASK, answer(content=text), {"role": "tool", "content": "1"}, answer())
    assert [turn.content for turn in found.turns] == ["Hi", text, "1", "Ho"]


def test_tools_that_the_system_turn_lists_are_not_listed_again() -> None:
    system = {"role": "system", "content": "<tools>[]</tools>"}
    call = answer(content="<tool_call>{}</tool_call>")
    found = read(system, ASK, call, tools=[{"name": "f"}])
    assert (found.tools, found.ignored) == ([], {"tools"})
    found = read(ASK, call, tools=[{"name": "f"}])
    assert (found.tools, found.ignored) == ([{"name": "f"}], frozenset())


def test_what_is_not_read_of_a_message_is_reported_once() -> None:
    found = read(ASK | {"name": "ada", "id": ""}, answer(tone="calm", logprobs=[1]))
    assert found.ignored == {"messages.name", "messages.tone", "messages.logprobs"}


def test_a_key_that_no_file_can_hold_is_reported_readably() -> None:
    row = {"messages": '[{"role": "user", "content": "Hi", "\\ud800": 1}]'}
    assert convert(row).ignored == {"messages.?"}


@pytest.mark.parametrize("value", [b"PNG", {"bytes": b"PNG"}, [{"bytes": b"PNG", "path": None}]])
def test_media_of_a_row_are_a_fault_whatever_the_column_is_called(value: object) -> None:
    with pytest.raises(RowError, match="not_text"):
        convert({"messages": [ASK, answer()], "jpg": value})


@pytest.mark.parametrize("keys", [{"images": ["a"]}, {"audio": {"id": "a"}}, {"video": "a"}])
def test_media_of_a_message_are_a_fault(keys: dict[str, Any]) -> None:
    assert fault(ASK | keys, answer()) == ("not_text", "turn 1")


def test_the_order_of_turns() -> None:
    system, tool = {"role": "system", "content": "Be short"}, {"role": "tool", "content": "3"}
    assert len(read(answer(), ASK, answer()).turns) == 3
    assert len(read(ASK, answer(), system, ASK, answer()).turns) == 5
    assert fault(tool, answer()) == ("wrong_order", "turn 1")
    assert fault(ASK, tool, answer()) == ("wrong_order", "turn 2")
    assert fault(ASK, answer(), system) == ("no_final_answer", "")
