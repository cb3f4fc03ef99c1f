"""Conversations while they are read and checked."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: function name, arguments (a JSON object), and an id if the source has one."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn.

    Attributes:
        role: system, user, assistant, tool, or text; the checks reject any other role.
        content: Text; empty if an assistant only calls tools.
        calls: Tool calls of an assistant turn.
        name: Function that a tool turn answers.
        call_id: Id of the call that a tool turn answers.
    """

    role: str
    content: str
    calls: tuple[Call, ...] = field(default=())
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the tools available to the assistant as JSON values, empty if there are none."""

    turns: list[Turn]
    tools: list[dict[str, Any]] = field(default_factory=list)
