"""Which requests are accepted, and what they mean."""

from typing import Any

import pytest
from pydantic import ValidationError

from infra.serving.request import ChatRequest

TURN = {"role": "user", "content": "Who?"}


def parse(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [TURN], **fields})


def test_decoding_is_greedy_without_a_temperature() -> None:
    assert parse().sampling == parse(temperature=0, top_p=0.5).sampling == {}
    assert parse(temperature=0.5, top_p=0.9).sampling == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
    }


def test_the_limit_has_two_names_and_a_default() -> None:
    limits = [parse(), parse(max_tokens=7), parse(max_completion_tokens=8, max_tokens=7)]
    assert [request.limit for request in limits] == [512, 7, 8]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    assert parse(messages=[{"role": "user", "content": parts}]).turns == [
        {"role": "user", "content": "Who are you?"}
    ]


def test_parameters_without_effect_are_accepted() -> None:
    """As a client sends them that repeats the last answer and every parameter that it knows."""
    replayed = {"role": "assistant", "content": "I.", "refusal": None, "tool_calls": None, "audio": None}
    nothing = {"n": 1, "presence_penalty": 0.0, "logprobs": False, "stop": None, "tools": []}
    text = {"response_format": {"type": "text"}, "user": "ada", "metadata": {"night": "1"}}
    request = parse(messages=[TURN, replayed, TURN], **nothing, **text)
    assert request.turns[1] == {"role": "assistant", "content": "I."}
    assert request.model_dump() == parse(messages=[TURN, replayed, TURN]).model_dump()


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"n": 2}, "n"),
        ({"stop": ["."]}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_k": 5}, "top_k"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_all": True}}, "stream_options.include_all"),
        ({"messages": []}, "messages"),
        ({"messages": "Who?"}, "messages"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"messages": [TURN | {"name": "ada"}]}, "messages.0.name"),
    ],
)
def test_whatever_is_not_supported_is_an_error(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(**fields)
    assert [".".join(map(str, fault["loc"])) for fault in caught.value.errors()] == [where]
