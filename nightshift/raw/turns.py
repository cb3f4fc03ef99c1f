"""A conversation while it is being read and checked."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the function, its arguments (a JSON object), and an id if the source gives one."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn.

    Attributes:
        role: system, user, assistant, tool, or text; another word is a fault that the checks find.
        content: The text; empty if an assistant only calls functions.
        calls: Calls of an assistant's turn.
        name: Function that a tool's turn answers for.
        call_id: Id of the call that a tool's turn answers.
    """

    role: str
    content: str
    calls: tuple[Call, ...] = field(default=())
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the functions that the assistant may call: JSON values, empty if there are none."""

    turns: list[Turn]
    tools: list[dict[str, Any]] = field(default_factory=list)
