"""Repairs of a conversation. Each is counted; the text itself is changed only if that is asked for."""

from dataclasses import replace
from itertools import takewhile

import ftfy

from nightshift.raw.turns import Change, Conversation, Turn

# Characters of an example of a repair, and how many of them before the place that changed.
SHOWN = 80
BEFORE = 20


def repair(conversation: Conversation, *, fix_encoding: bool = False) -> Conversation:
    """Replace Windows line endings and, if asked for, fix wrong decoding (mojibake).

    Only non-ASCII text can be mojibake.

    Example:
        >>> found = repair(Conversation([Turn("user", "Caf\u00c3\u00a9")]), fix_encoding=True)
        >>> found.turns[0].content, found.changes
        ('Café', {'mojibake': ('CafÃ©', 'Café')})
    """
    texts = [turn.content for turn in conversation.turns]
    if not any("\r\n" in text or (fix_encoding and not text.isascii()) for text in texts):
        return conversation
    turns, changes = [], dict(conversation.changes)
    for turn, text in zip(conversation.turns, texts, strict=True):
        if "\r\n" in text:
            text = text.replace("\r\n", "\n")
            changes.setdefault("line_ends", cut(turn.content, text))
        if fix_encoding and not text.isascii() and (decoded := ftfy.fix_encoding(text)) != text:
            changes.setdefault("mojibake", cut(text, decoded))
            text = decoded
        turns.append(turn if text == turn.content else replace(turn, content=text))
    return replace(conversation, turns=turns, changes=changes)


def arrange(conversation: Conversation) -> Conversation:
    r"""Remove empty system turns, and join turns of the same speaker that follow each other.

    Many chat templates reject two turns of one speaker in a row; those that accept them differ in what
    they make of them. Texts are joined with a blank line, calls of tools as parallel calls. Turns of which
    only one is trained stay apart.

    Example:
        >>> found = arrange(Conversation([Turn("user", "Hi"), Turn("user", "Who?"), Turn("assistant", "I")]))
        >>> [turn.content for turn in found.turns], found.changes["joined_turns"]
        (['Hi\n\nWho?', 'I'], ('user, user, assistant', 'user, assistant'))
    """
    changes = dict(conversation.changes)
    turns = [turn for turn in conversation.turns if turn.role != "system" or turn.content.strip()]
    if len(turns) < len(conversation.turns):
        changes.setdefault("empty_system", cut(_roles(conversation.turns), _roles(turns)))
    joined: list[Turn] = []
    for turn in turns:
        if joined and turn.role != "tool" and (joined[-1].role, joined[-1].train) == (turn.role, turn.train):
            joined[-1] = _join(joined[-1], turn)
        else:
            joined.append(turn)
    if len(joined) == len(conversation.turns):
        return conversation
    if len(joined) < len(turns):
        changes.setdefault("joined_turns", cut(_roles(turns), _roles(joined)))
    return replace(conversation, turns=joined, changes=changes)


def cut(before: str, after: str) -> Change:
    r"""Cut two texts to the first place where they differ, at most 80 characters each.

    Example:
        >>> cut("Good morning to all of you,\r\nHi", "Good morning to all of you,\nHi")
        ('…rning to all of you,\r\nHi', '…rning to all of you,\nHi')
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    start = max(0, same - BEFORE)
    mark = "…" if start else ""
    return (mark + before[start:])[:SHOWN], (mark + after[start:])[:SHOWN]


def _join(first: Turn, second: Turn) -> Turn:
    content, reasoning = (
        "\n\n".join(text for text in texts if text.strip())
        for texts in ((first.content, second.content), (first.reasoning, second.reasoning))
    )
    return replace(first, content=content, reasoning=reasoning, calls=(*first.calls, *second.calls))


def _roles(turns: list[Turn]) -> str:
    return ", ".join(turn.role for turn in turns)
