"""Lists of messages: OpenAI, ShareGPT, Anthropic, Gemini, Hermes, LLaMA-Factory and Axolotl."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nightshift.raw.columns import column_name, is_given
from nightshift.raw.contents import MEDIA, REASONING, read_content, read_text, word
from nightshift.raw.faults import RowError
from nightshift.raw.flags import pop_flag
from nightshift.raw.formats import RawRow
from nightshift.raw.strict_json import loads
from nightshift.raw.tool_calls import parse_calls, parse_sharegpt_calls
from nightshift.raw.turns import Turn

# There is no standard: names that the datasets of FastChat, Axolotl, LLaMA-Factory, OpenAssistant, Cohere,
# Gemini and smolagents use, in lower case with "_" for "-" and " ".
SPEAKERS = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt gpt4 model bot chatbot ai bing bard function_call tool_call",
    "tool": """
        tool function observation function_response function_output tool_response tool_result ipython
    """,
}
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers.split()}
# Speakers whose whole turn is a call as JSON.
CALLERS = ("function_call", "tool_call")
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message", "parts")
# A list of messages that was written into one cell of a CSV file, as JSON or (wrongly) as Python.
WRITTEN_LIST = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")


def parse_messages(value: object) -> list[RawRow]:
    """Return a list of messages; CSV contains it as JSON.

    Raises:
        RowError: The value is not a list of objects.
    """
    if isinstance(value, str):
        try:
            value = loads(value)
        except ValueError as err:
            raise RowError("no_messages", "not valid JSON") from err
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise RowError("no_messages")
    return value


def is_messages(value: object) -> bool:
    """Return whether a question or answer is a list of messages instead of a text.

    Example:
        >>> is_messages([{"from": "gpt", "value": "Ho"}]), is_messages([{"type": "text", "text": "Ho"}])
        (True, False)
    """
    if isinstance(value, str):
        return WRITTEN_LIST.match(value) is not None
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and any(key in one for key in ROLE_KEYS) for one in value)
    )


def read_turns(value: object, roles: Mapping[str, str], ignored: set[str]) -> list[Turn]:
    """Read a list of messages.

    Args:
        value: The list, or the list as JSON.
        roles: Speaker as the source names it -> role.
        ignored: Receives the keys of messages that are not read, such as `messages.name`.

    Raises:
        RowError: The value is not a list of messages with a known role.
    """
    return [
        turn
        for number, message in enumerate(parse_messages(value), start=1)
        for turn in read_message(message, number, roles, ignored)
    ]


def read_message(message: RawRow, number: int, roles: Mapping[str, str], ignored: set[str]) -> list[Turn]:
    """Read a message: one turn, or the answers of several tools and a turn of the user (Anthropic)."""
    if len(message) == 2 and (simple := _simple_turn(message, roles)):
        return [simple]
    rest = {key: value for key, value in message.items() if value is not None}
    speaker = next((rest.pop(key) for key in ROLE_KEYS if key in rest), None)
    if not isinstance(speaker, str):
        raise RowError("no_messages", "a turn has no role")
    where = f"turn {number}"
    role, flag = find_role(speaker, roles, where), pop_flag(rest, where)
    value = next((rest.pop(key) for key in CONTENT_KEYS if key in rest), None)
    if any(key in MEDIA and is_given(rest[key]) for key in rest):
        raise RowError("not_text", where)
    if role == "assistant" and speaker not in roles and _plain(speaker) in CALLERS:
        turns = [Turn(role, "", parse_sharegpt_calls(value))]
    else:
        turns = _read_turn(role, value, rest, where, ignored)
    flags = {flag, *(None if turn.train else False for turn in turns)} - {None}
    train = False not in flags
    if role != "assistant" and flag:
        ignored.add(f"messages: training flag of a {role} turn")
    ignored.update(f"messages.{column_name(key)}" for key in rest if is_given(rest[key]))
    return [replace(turn, train=train) for turn in turns]


def find_role(speaker: str, roles: Mapping[str, str], where: str) -> str:
    """Return the role of a speaker.

    Raises:
        RowError: Neither the formats nor the source's options name the speaker.

    Example:
        >>> find_role("Kundin", {"Kundin": "user"}, "turn 1"), find_role("GPT", {}, "turn 2")
        ('user', 'assistant')
    """
    role = roles.get(speaker) or ROLES.get(_plain(speaker))
    if role is None:
        raise RowError("unknown_role", where)
    return role


def _simple_turn(message: RawRow, roles: Mapping[str, str]) -> Turn | None:
    """Read the usual message, a speaker and a text, ten times faster; None for another one."""
    speaker, text = message.get("role"), message.get("content")
    if speaker is None:
        speaker, text = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or not isinstance(text, str) or speaker in CALLERS or speaker in roles:
        return None
    role = ROLES.get(speaker)
    return Turn(role, text) if role else None


def _plain(speaker: str) -> str:
    return speaker.strip().lower().replace("-", "_").replace(" ", "_")


def _read_turn(role: str, value: object, rest: RawRow, where: str, ignored: set[str]) -> list[Turn]:
    """Read content, calls and answers of a message; what stays in `rest` is not read."""
    content = read_content(value, where)
    ignored.update(f"messages.{key}" for key in content.ignored)
    calls = content.calls
    for key in ("tool_calls", "function_call"):
        found = rest.pop(key, None)
        if is_given(found):
            calls += parse_sharegpt_calls(found) if key == "function_call" else parse_calls(found)
    text, reasoning = content.text or _refusal(rest), content.reasoning
    thought = next((one for one in REASONING if is_given(rest.get(one))), None)
    if role == "assistant" and thought:
        reasoning = read_text(rest.pop(thought))
    # OpenAI also allows a name on user turns; no chat template renders it.
    name, call_id = (_tool_name(rest), _call_id(rest)) if role == "tool" else (None, None)
    turn = Turn(role, text, calls, name, call_id, content.train is not False, reasoning)
    return [*content.answers, *([turn] if text or calls or not content.answers else [])]


def _refusal(rest: RawRow) -> str:
    """Return an OpenAI refusal, which replaces the content."""
    refusal: Any = rest.get("refusal")
    return rest.pop("refusal") if isinstance(refusal, str) else ""


def _tool_name(rest: RawRow) -> str | None:
    return word(rest.pop("name", None))


def _call_id(rest: RawRow) -> str | None:
    return word(rest.pop("tool_call_id", None)) or word(rest.pop("call_id", None))
