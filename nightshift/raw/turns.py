"""Conversations while they are read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# A repair's text before and after, cut to the place that changed.
Change = tuple[str, str]


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
        train: Whether an assistant turn is trained.
        reasoning: What the assistant thought before its answer.
    """

    role: str
    content: str
    calls: tuple[Call, ...] = field(default=())
    name: str | None = None
    call_id: str | None = None
    train: bool = True
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a row.

    Attributes:
        turns: Turns, in order.
        tools: Tools available to the assistant as JSON values, empty if there are none.
        ignored: Columns of the row, and keys of its messages (`messages.name`), that were not read.
        changes: Repair -> the first place that it changed.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] = field(default_factory=list)
    ignored: frozenset[str] = frozenset()
    changes: Mapping[str, Change] = field(default_factory=dict)


def train_last(conversation: Conversation) -> Conversation:
    """Train only the last answer of a conversation; the others are read.

    Example:
        >>> turns = [Turn(role, "Hi") for role in ("user", "assistant", "user", "assistant")]
        >>> [turn.train for turn in train_last(Conversation(turns)).turns if turn.role == "assistant"]
        [False, True]
    """
    answers = [number for number, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    turns = [
        replace(turn, train=False) if number in answers[:-1] else turn
        for number, turn in enumerate(conversation.turns)
    ]
    return replace(conversation, turns=turns)
