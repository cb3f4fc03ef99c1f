"""Convert rows of common dataset formats to turns; the keys of a row determine its format.

| format | keys |
|---|---|
| messages (OpenAI) | `messages`: role, content, tool_calls, tool_call_id; `tools` |
| ShareGPT | `conversations`: from, value; `system`, `tools` |
| Alpaca | `instruction`, `output`; `input`, `system`, `history` |
| prompt-completion (TRL) | `prompt`, `completion`: text or messages; `tools` |
| plain text | `text` |

The first format whose keys are all present applies; other keys of the row are ignored.
"""

from collections.abc import Callable

from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow
from nightshift.raw.pii import redact
from nightshift.raw.strict_json import loads
from nightshift.raw.tool_calls import parse_calls, parse_sharegpt_calls, parse_tools
from nightshift.raw.turns import Conversation, Turn

# ShareGPT has no standard: names that FastChat, Axolotl and LLaMA-Factory read.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def convert(row: RawRow) -> Conversation:
    """Convert a row of any known format.

    Raises:
        RowError: No format matches, or a part of the row has the wrong type.

    Example:
        >>> [turn.role for turn in convert({"instruction": "Add", "input": "1, 2", "output": "3"}).turns]
        ['user', 'assistant']
    """
    for keys, read in SHAPES:
        if all(row.get(key) is not None for key in keys):
            turns = read(row)
            return Conversation(_with_system(row, turns), parse_tools(row.get("tools")))
    seen = sorted(redact(key)[:40] for key in row)[:12]
    raise RowError("unknown_format", ", ".join(seen) or "none")


def read_turns(value: object) -> list[Turn]:
    """Read a list of OpenAI or ShareGPT turns; CSV contains the list as JSON.

    Raises:
        RowError: The value is not a list of turns.
    """
    if isinstance(value, str):
        try:
            value = loads(value)
        except ValueError as err:
            raise RowError("no_messages", "not valid JSON") from err
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise RowError("no_messages")
    return [_sharegpt_turn(turn) if turn.get("from") is not None else _message_turn(turn) for turn in value]


def _message_turn(message: RawRow) -> Turn:
    """Read a turn with role and content (OpenAI format)."""
    role, call_id = message.get("role"), _word(message.get("tool_call_id"))
    if not isinstance(role, str):
        raise RowError("no_messages", "a turn has no role")
    calls = parse_calls(message.get("tool_calls")) if message.get("tool_calls") else ()
    # OpenAI also allows a name on user turns; no chat template renders it.
    name = _word(message.get("name")) if role == "tool" else None
    return Turn(role, _text(message.get("content")), calls, name, call_id)


def _sharegpt_turn(turn: RawRow) -> Turn:
    """Read a turn with from and value (ShareGPT format)."""
    word, value = turn["from"], turn.get("value")
    role = SHAREGPT_ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        raise RowError("unknown_role", f"from is not one of {', '.join(SHAREGPT_ROLES)}")
    if word == "function_call":
        return Turn(role, "", parse_sharegpt_calls(value))
    return Turn(role, _text(value), name=_word(turn.get("name")))


def _alpaca(row: RawRow) -> list[Turn]:
    """Join instruction and input to one question; earlier turns come from `history`."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(r, list) and len(r) == 2 for r in history):
        raise RowError("no_messages", "history is not a list of [question, answer]")
    turns = [
        Turn(role, _text(text))
        for round_ in history
        for role, text in zip(("user", "assistant"), round_, strict=True)
    ]
    parts = [_text(row["instruction"]).strip(), _text(row.get("input")).strip()]
    question = "\n\n".join(part for part in parts if part)
    return [*turns, Turn("user", question), Turn("assistant", _text(row["output"]))]


def _prompt_completion(row: RawRow) -> list[Turn]:
    """Read prompt and completion, each a string or a list of messages."""
    return [*_part(row["prompt"], "user"), *_part(row["completion"], "assistant")]


def _part(value: object, role: str) -> list[Turn]:
    """Read a string as one turn, a list as messages."""
    return [Turn(role, value)] if isinstance(value, str) else read_turns(value)


def _with_system(row: RawRow, turns: list[Turn]) -> list[Turn]:
    """Prepend the row's separate system prompt to the turns."""
    system = row.get("system")
    if not system or turns[0].role in ("system", "text"):
        return turns
    return [Turn("system", _text(system)), *turns]


def _text(value: object) -> str:
    """Return content as text: a string, or OpenAI's list of text parts; None becomes empty.

    Raises:
        RowError: The content has another type.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise RowError("not_text", type(value).__name__)
    texts = [part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(value):
        raise RowError("not_text", "a part is not text")
    return "".join(texts)


def _word(value: object) -> str | None:
    """Return a name or id if it is a non-empty string, otherwise None."""
    return value if isinstance(value, str) and value else None


SHAPES: tuple[tuple[tuple[str, ...], Callable[[RawRow], list[Turn]]], ...] = (
    (("messages",), lambda row: read_turns(row["messages"])),
    (("conversations",), lambda row: read_turns(row["conversations"])),
    (("instruction", "output"), _alpaca),
    (("prompt", "completion"), _prompt_completion),
    (("text",), lambda row: [Turn("text", _text(row["text"]))]),
)
