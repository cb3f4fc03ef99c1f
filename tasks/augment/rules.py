"""Deterministic backend: direct questions become indirect, passive answers active.

A rule is a pattern and a template. A turn that no rule matches keeps its wording.
"""

import re
from collections.abc import Iterator

from nightshift.data.schemas import Message
from tasks.augment.quality import Messages

OPENERS = ("Tell me", "Please say", "I would like to know", "Explain", "Can you say")
_WH = r"(?:In |To |At |On )?(?:What|Which|Who|Where|When|Why|How|which|what)\b"
# Patterns of English questions -> the indirect form that follows an opener.
QUESTIONS = (
    # What is the symbol of gold? -> what the symbol of gold is
    (re.compile(r"^(What|Who|Where) (is|are|was|were) (?!.*\w+ed\?$)(.+)\?$"), r"\1 \3 \2"),
    # In which year was gold discovered? -> in which year gold was discovered
    (
        re.compile(rf"^({_WH}.*?) (is|are|was|were) (.+) (\w+ed|found|made|born)\?$"),
        r"\1 \3 \2 \4",
    ),
    # Where does the name come from? -> where the name comes from
    (
        re.compile(rf"^({_WH}.*?) does (.+) (come|belong|mean|live|work)( from| in)?\?$"),
        r"\1 \2 \3s\4",
    ),
    # Who discovered gold? -> who discovered gold
    (re.compile(r"^(Who \w+ed .+)\?$"), r"\1"),
)
ANSWERS = (
    # The symbol of gold is Au. -> Au is the symbol of gold.
    (re.compile(r"^The ((?:\w+ ){1,3}of [^.]+?) is ([^.]+)\.$"), r"\2 is the \1."),
    # Gold was discovered by Ann. -> Ann discovered gold.
    (re.compile(r"^(.+) (?:was|were) (\w+ed) by (.+)\.$"), r"\3 \2 \1."),
    # Gold was discovered in 1751. -> It was in 1751 that gold was discovered.
    (re.compile(r"^(.+) (was|were) (\w+ed) in ([^.]+)\.$"), r"It was in \4 that \1 \2 \3."),
    # Gold belongs to group 11. -> It is group 11 to which gold belongs.
    (re.compile(r"^(.+) belongs to ([^.]+)\.$"), r"It is \2 to which \1 belongs."),
    # The origin of the name gold: Saxon. -> Saxon: this is the origin of the name gold.
    (re.compile(r"^The (origin of [^:]+): (.+)\.$"), r"\2: this is the \1."),
)


def propose(messages: Messages, count: int) -> Iterator[list[str]]:
    """Yield up to `count` candidates, each as the texts of its turns.

    Each candidate opens the questions differently; the first, third and fifth also restate the answers.

    Example:
        >>> turns = [{"role": "user", "content": "Who discovered Gallium?"},
        ...          {"role": "assistant", "content": "Gallium was discovered by Lecoq."}]
        >>> list(propose(turns, 1))
        [['Tell me who discovered Gallium.', 'Lecoq discovered Gallium.']]
    """
    for ordinal in range(min(count, len(OPENERS))):
        yield [_reword(m, OPENERS[ordinal], restated=ordinal % 2 == 0) for m in messages]


def _reword(message: Message, opener: str, *, restated: bool) -> str:
    """Apply the first matching rule to one turn."""
    text = message["content"]
    if message["role"] == "user":
        for pattern, template in QUESTIONS:
            if found := pattern.match(text):
                indirect = found.expand(template)
                return f"{opener} {indirect[0].lower()}{indirect[1:]}."
    elif message["role"] == "assistant" and restated:
        for pattern, template in ANSWERS:
            if found := pattern.match(text):
                return found.expand(template)
    return text
