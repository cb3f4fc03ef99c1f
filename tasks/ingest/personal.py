"""Find personal data in a conversation and redact it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nightshift.raw.pii import Find, find_pii, redact
from nightshift.raw.strict_json import dumps
from nightshift.raw.turns import Conversation, Turn


@dataclass(frozen=True, slots=True)
class PiiSpan:
    """Position of personal data; the value itself is never stored.

    Attributes:
        kind: Kind of data, such as email.
        turn: Number of the turn, from 1; 0 for the row's tools.
        field: `content`, `reasoning`, `tool_calls` or `tools`.
        start: First character in the field, or in its JSON if it is not text.
        end: Last character + 1.
    """

    kind: str
    turn: int
    field: str
    start: int
    end: int


def find_pii_spans(conversation: Conversation, find: Find) -> list[PiiSpan]:
    """Find personal data in contents, call arguments and tools."""
    return [
        PiiSpan(finding.kind, turn, field, finding.start, finding.end)
        for turn, field, text in _texts(conversation)
        for finding in find(text)
    ]


def redact_conversation(conversation: Conversation, find: Find) -> Conversation:
    """Replace personal data with its kind in brackets."""
    turns = [
        replace(
            turn,
            content=redact(turn.content, find),
            reasoning=redact(turn.reasoning, find),
            calls=tuple(replace(call, arguments=redact_json(call.arguments, find)) for call in turn.calls),
        )
        for turn in conversation.turns
    ]
    return replace(conversation, turns=turns, tools=redact_json(conversation.tools, find))


def redact_json(value: Any, find: Find = find_pii) -> Any:
    """Redact every string, number and key of a JSON value; it stays valid JSON.

    Example:
        >>> redact_json({"to": ["ada@example.org"], "card": 4111111111111111, "count": 3})
        {'to': ['[EMAIL]'], 'card': '[CARD]', 'count': 3}
    """
    if isinstance(value, str):
        return redact(value, find)
    if isinstance(value, dict):
        return {redact(key, find): redact_json(one, find) for key, one in value.items()}
    if isinstance(value, list):
        return [redact_json(one, find) for one in value]
    if isinstance(value, int) and find_pii(str(value)):
        return redact(str(value))
    return value


def _texts(conversation: Conversation) -> Iterator[tuple[int, str, str]]:
    """Yield (turn, field, text) of everything to search."""
    if conversation.tools:
        yield 0, "tools", dumps(conversation.tools)
    for number, turn in enumerate(conversation.turns, start=1):
        yield number, "content", turn.content
        if turn.reasoning:
            yield number, "reasoning", turn.reasoning
        if turn.calls:
            yield number, "tool_calls", calls_json(turn)


def calls_json(turn: Turn) -> str:
    """Return the calls of a turn as stored in the column `tool_calls`."""
    return dumps([{"name": call.name, "arguments": call.arguments} for call in turn.calls])
