"""Personal data in a conversation: where it stands, and the conversation without it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nightshift.raw.pii import Find, find_pii, redact
from nightshift.raw.strict_json import dumps
from nightshift.raw.turns import Conversation, Turn


@dataclass(frozen=True, slots=True)
class Place:
    """Where personal data stands; the value itself is kept nowhere.

    Attributes:
        kind: Kind of data, such as email.
        turn: Number of the turn from 1; 0 for the row's tools.
        field: content, tool_calls, or tools.
        start: First character of the field; of its JSON if it is not a text.
        end: Last character + 1.
    """

    kind: str
    turn: int
    field: str
    start: int
    end: int


def find_places(conversation: Conversation, find: Find) -> list[Place]:
    """Find personal data in contents, in the arguments of calls, and in tools."""
    return [
        Place(finding.kind, turn, field, finding.start, finding.end)
        for turn, field, text in _texts(conversation)
        for finding in find(text)
    ]


def redact_conversation(conversation: Conversation, find: Find) -> Conversation:
    """Put the kind in brackets where personal data stood."""
    turns = [
        replace(
            turn,
            content=redact(turn.content, find),
            calls=tuple(replace(call, arguments=redact_json(call.arguments, find)) for call in turn.calls),
        )
        for turn in conversation.turns
    ]
    return Conversation(turns, redact_json(conversation.tools, find))


def redact_json(value: Any, find: Find = find_pii) -> Any:
    """Redact every text and number of a JSON value, and the keys; it stays valid JSON.

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
    """Yield (turn, field, text) of all that is looked through."""
    if conversation.tools:
        yield 0, "tools", dumps(conversation.tools)
    for number, turn in enumerate(conversation.turns, start=1):
        yield number, "content", turn.content
        if turn.calls:
            yield number, "tool_calls", calls_json(turn)


def calls_json(turn: Turn) -> str:
    """Return the calls of a turn as they stand in the column `tool_calls`."""
    return dumps([{"name": call.name, "arguments": call.arguments} for call in turn.calls])
