"""Checks of a conversation: intact text, no chat markup, roles in order, something to train."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from nightshift.raw.faults import ROLES, RowError
from nightshift.raw.strict_json import dumps
from nightshift.raw.tool_calls import pair_answers
from nightshift.raw.turns import Conversation, Turn

# Markup that chat templates write between turns (<|im_start|>, [INST], <s>). In a text it could forge
# a turn.
CHAT_MARKUP = r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>"
# C0 except tab and line feed, DEL, C1; lone surrogates; characters that reorder text on the screen only
# (CVE-2021-42574); the replacement character of decoders.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffd]")

# Role -> roles that may follow it.
FOLLOWERS = {
    "": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def compile_special_tokens(tokens: Collection[str]) -> re.Pattern[str]:
    """Compile the forbidden markup: that of common chat templates, and the base model's own tokens.

    Example:
        >>> bool(compile_special_tokens(["<filename>"]).search("open <filename>"))
        True
    """
    # Longest first: one token may be a prefix of another.
    own = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join([CHAT_MARKUP, *map(re.escape, own)]))


def check(conversation: Conversation, special: re.Pattern[str]) -> Conversation:
    """Check roles, contents and order, and pair tool answers with their calls.

    Raises:
        RowError: The first problem found.
    """
    turns = conversation.turns
    if not turns:
        raise RowError("no_final_answer")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in ROLES and (turn.role != "text" or len(turns) > 1):
            raise RowError("unknown_role", f"turn {number}")
        _check_turn(turn, special, number)
    if conversation.tools:
        _check_text(dumps(conversation.tools), special, 0)
    if turns[0].role == "text":
        return conversation
    _check_order([turn.role for turn in turns])
    if not any(turn.train for turn in turns if turn.role == "assistant"):
        raise RowError("no_supervised_token", "every assistant turn has the weight 0")
    paired = pair_answers(turns)
    return conversation if paired is turns else replace(conversation, turns=paired)


def _check_turn(turn: Turn, special: re.Pattern[str], number: int) -> None:
    """Check one turn."""
    if turn.calls and turn.role != "assistant":
        raise RowError("malformed_tool_call", f"turn {number} is not an assistant turn")
    # A tool may well answer nothing.
    if not (turn.calls or turn.content.strip() or turn.role == "tool"):
        raise RowError("empty_content", f"turn {number}")
    _check_text(turn.content, special, number)
    _check_text(turn.reasoning, special, number)
    for call in turn.calls:
        _check_text(dumps([call.name, call.arguments]), special, number)
    if turn.name:
        _check_text(turn.name, special, number)


def _check_text(text: str, special: re.Pattern[str], number: int) -> None:
    """Check one text of a turn; turn 0 is the row's `tools`."""
    where = f"turn {number}" if number else "tools"
    if found := CONTROL.search(text):
        raise RowError("control_character", f"U+{ord(found[0]):04X}, {where}")
    if special.search(text):
        raise RowError("special_token", where)


def _check_order(roles: Sequence[str]) -> None:
    """Check the order: user and assistant turns alternating, assistant last; system turns anywhere.

    The assistant may begin. Tool turns come between two assistant turns: user, assistant, tool, tool,
    assistant, user. `pair_answers` checks whether the tools were called. Whether the model knows system
    turns in the middle, its chat template decides.
    """
    before = ""
    for number, role in enumerate(roles, start=1):
        if role == "system":
            continue
        if role not in FOLLOWERS[before]:
            raise RowError("wrong_order", f"turn {number}")
        before = role
    if roles[-1] != "assistant":
        raise RowError("no_final_answer")
