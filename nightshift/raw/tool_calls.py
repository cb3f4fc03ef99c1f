"""Tool calls: parse the OpenAI and ShareGPT formats, and pair each answer with its call."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nightshift.raw.faults import RowError
from nightshift.raw.strict_json import dumps, loads
from nightshift.raw.turns import Call, Turn

# Nesting depth of lists and objects. Real function schemas have 10 to 20 levels; templates recurse.
MAX_DEPTH = 64
# Calls that an assistant writes as text: Hermes, Glaive, ToolACE. They are trained as they are written.
TEXT_CALL = re.compile(
    r"<\|?tool_calls?\|?>|<function(?:call|=)|^\s*\[\s*[A-Za-z_][\w .:/-]*\(.*\)\s*\]\s*$", re.DOTALL
)


def parse_calls(value: object) -> tuple[Call, ...]:
    """Parse the `tool_calls` of an assistant turn.

    Raises:
        RowError: A call has no name, or its arguments are not a JSON object.

    Example:
        >>> function = {"name": "add", "arguments": '{"a": 1}'}
        >>> parse_calls([{"id": "c1", "type": "function", "function": function}])
        (Call(name='add', arguments={'a': 1}, id='c1'),)
    """
    calls = from_json(value)
    if not isinstance(calls, list):
        raise RowError("malformed_tool_call", "tool_calls is not a list")
    return tuple(_call(call) for call in calls)


def parse_sharegpt_calls(value: object) -> tuple[Call, ...]:
    """Parse the value of a `function_call` turn: one call or a list of calls, as JSON.

    Raises:
        RowError: See `parse_calls`.
    """
    calls = from_json(value)
    return parse_calls(calls if isinstance(calls, list) else [calls])


def parse_tools(value: object) -> list[dict[str, Any]]:
    """Parse the tools available to the assistant; a string contains the list, or one tool, as JSON.

    Raises:
        RowError: The value is not a list of objects.

    Example:
        >>> parse_tools([{"name": "add", "input_schema": {"type": "object"}}])
        [{'type': 'function', 'function': {'name': 'add', 'parameters': {'type': 'object'}}}]
    """
    tools = from_json(value) if value else []
    tools = [from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("malformed_tool_call", "tools is not a list of objects")
    _require_json(tools)
    return [_from_anthropic(tool) for tool in tools]


def parse_functions(value: object) -> list[dict[str, Any]]:
    """Parse OpenAI's legacy `functions`: the same tools without their wrapper.

    Raises:
        RowError: See `parse_tools`.
    """
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in parse_tools(value)
    ]


def _from_anthropic(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool in OpenAI's form, which chat templates render, if it is in Anthropic's."""
    if "input_schema" not in tool:
        return tool
    function = {key: tool[key] for key in ("name", "description") if key in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def from_json(value: object) -> Any:
    """Parse a string as JSON; return other values unchanged.

    Raises:
        RowError: The string is not valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return loads(value)
    except ValueError as err:
        raise RowError("malformed_tool_call", "not valid JSON") from err


def pair_answers(turns: list[Turn]) -> list[Turn]:
    """Return the turns with each tool turn named after its function, in the order of the calls.

    A tool turn answers the call with its id; without an id, the first open call of its name; without a
    name, the first open call. Answers to calls that are written as text stay as they are. A conversation
    may end with calls.

    Raises:
        RowError: A tool turn matches no call, or a call has no answer before the next other turn.
    """
    if not any(turn.calls or turn.role == "tool" for turn in turns):
        return turns
    paired: list[Turn] = []
    while len(paired) < len(turns):
        start = len(paired)
        calls = paired[-1].calls if paired else ()
        end = next((i for i in range(start, len(turns)) if turns[i].role != "tool"), len(turns))
        if not calls and paired and TEXT_CALL.search(paired[-1].content):
            paired += turns[start:end]
        elif calls or end > start:
            paired += _pair(calls, turns[start:end], start + 1)
        paired += turns[end : end + 1]
    return paired


def _pair(calls: Sequence[Call], answers: Sequence[Turn], first: int) -> list[Turn]:
    """Return the named answers in the order of the calls; `first` is the first answer's turn number."""
    found: dict[int, Turn] = {}
    for number, answer in enumerate(answers, start=first):
        free = [j for j, call in enumerate(calls) if j not in found and _fits(call, answer)]
        if not free:
            raise RowError("unpaired_tool_answer", f"turn {number}")
        found[free[0]] = replace(answer, name=calls[free[0]].name)
    if len(found) < len(calls):
        raise RowError("unanswered_tool_call", f"turn {first - 1}")
    return [found[j] for j in range(len(calls))]


def _fits(call: Call, answer: Turn) -> bool:
    """Return whether an answer can belong to a call."""
    if answer.call_id is not None and call.id is not None:
        return answer.call_id == call.id
    return answer.name in (None, call.name)


def _call(value: object) -> Call:
    """Parse one call, with or without the wrapper `function`."""
    call = from_json(value)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("malformed_tool_call", "a call has no name")
    arguments = from_json(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise RowError("malformed_tool_call", "arguments are not a JSON object")
    _require_json(arguments)
    call_id = call.get("id")
    return Call(function["name"], arguments, call_id if isinstance(call_id, str) and call_id else None)


def _require_json(value: object) -> None:
    """Reject what JSON cannot represent (Parquet times, bytes, NaN) or a template cannot render."""
    if _depth(value) > MAX_DEPTH:
        raise RowError("too_deep", f"more than {MAX_DEPTH} levels in a call or in tools")
    try:
        dumps(value)
    except (TypeError, ValueError) as err:
        raise RowError("malformed_tool_call", "a value is not valid JSON") from err


def _depth(value: object) -> int:
    """Return the nesting depth of lists and objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)
