"""Content of a message: a text, or a list of parts (OpenAI, Anthropic, Gemini, LLaMA-Factory)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nightshift.raw.columns import column_name, is_given
from nightshift.raw.faults import RowError
from nightshift.raw.flags import pop_flag
from nightshift.raw.formats import RawRow
from nightshift.raw.tool_calls import parse_calls, parse_sharegpt_calls
from nightshift.raw.turns import Call, Turn

TEXT_PARTS = (None, "text", "input_text", "output_text", "refusal")
TEXT_KEYS = ("text", "value", "content", "refusal")
# Names of reasoning: of a part, and of a key of a message. Redacted thinking is encrypted.
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
REDACTED = "redacted_thinking"
MEDIA = ("image", "image_url", "images", "audio", "input_audio", "audios", "video", "videos", "file")


@dataclass(slots=True)
class Content:
    """What a message contains.

    Attributes:
        text: Its text parts, joined.
        reasoning: Its reasoning parts, joined.
        calls: Tool calls among the parts.
        answers: Answers of tools among the parts, as tool turns.
        train: Training flag of the parts; None without one.
        ignored: Keys that were not read.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    answers: list[Turn] = field(default_factory=list)
    train: bool | None = None
    ignored: set[str] = field(default_factory=set)


def read_content(value: object, where: str = "") -> Content:
    """Read the content of a message; None is empty.

    Args:
        value: A string, a list of parts, or one part.
        where: Place in the row, for errors.

    Raises:
        RowError: The content is not text, or its parts have different training flags.

    Example:
        >>> read_content([{"type": "text", "text": "Hi"}, {"type": "text", "value": "!"}]).text
        'Hi!'
    """
    if isinstance(value, str):
        return Content(value)
    if value is None:
        return Content()
    if isinstance(value, dict):
        value = value.get("parts", [value])
    if not isinstance(value, list):
        raise RowError("not_text", describe_type(value))
    content, flags = Content(), []
    for part in value:
        if not isinstance(part, dict):
            raise RowError("not_text", "a part is not text")
        rest = {key: one for key, one in part.items() if one is not None}
        flags.append(pop_flag(rest, where))
        _add_part(content, rest)
        content.ignored.update(f"content.{column_name(key)}" for key in rest if is_given(rest[key]))
    if len(set(flags)) > 1:
        raise RowError("partial_training", where)
    content.train = flags[0] if flags else None
    return content


def read_text(value: object) -> str:
    """Read a text that is not a message, such as an instruction.

    Raises:
        RowError: The value is not text.
    """
    content = read_content(value)
    if content.calls or content.answers:
        raise RowError("not_text", "a tool call")
    return content.text


def describe_type(value: object) -> str:
    """Return the type of a value that should be text.

    Example:
        >>> describe_type(3), describe_type(float("nan"))
        ('int', 'NaN')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity"
    return type(value).__name__


def _add_part(content: Content, rest: RawRow) -> None:
    """Read one part; what stays in `rest` is not read."""
    kind = rest.pop("type", None)
    if kind == REDACTED:
        rest.clear()
        content.ignored.add(f"content.{kind}")
    elif kind in REASONING:
        rest.pop("signature", None)
        thought = _first(rest, (kind, *TEXT_KEYS))
        if not isinstance(thought, str):
            raise RowError("not_text", "a part is not text")
        content.reasoning += thought
    elif kind in ("tool_call", "tool_calls"):
        content.calls += parse_sharegpt_calls(_first(rest, ("value", "content", "tool_calls")))
    elif kind == "tool_use":
        call = {
            "id": rest.pop("id", None),
            "name": rest.pop("name", None),
            "arguments": rest.pop("input", {}),
        }
        content.calls += parse_calls([call])
    elif kind == "tool_result":
        answer = read_text(rest.pop("content", None))
        content.answers.append(Turn("tool", answer, call_id=word(rest.pop("tool_use_id", None))))
    else:
        text = _first(rest, TEXT_KEYS)
        if kind not in TEXT_PARTS or not isinstance(text, str) or any(key in rest for key in MEDIA):
            raise RowError("not_text", "a part is not text")
        content.text += text


def word(value: object) -> str | None:
    """Return a name or id if it is a non-empty string, otherwise None."""
    return value if isinstance(value, str) and value else None


def _first(rest: RawRow, keys: tuple[str, ...]) -> Any:
    """Remove and return the first value that is there."""
    return next(_values(rest, keys), None)


def _values(rest: RawRow, keys: tuple[str, ...]) -> Iterator[Any]:
    return (rest.pop(key) for key in keys if key in rest)
