"""Deterministic backend: direct questions become indirect, passive answers active.

A rule is a pattern and a template. A turn that no rule matches keeps its wording.
"""

import re
from collections.abc import Iterator

from nightshift.data.schemas import Message
from tasks.augment.quality import Messages

OPENERS = ("Tell me", "Please say", "I would like to know", "Explain", "Can you say")
# Only simple sentences: what follows has no second clause, whose words would end up in the wrong place.
_SIMPLE = (
    r"(?!.*(?:[,;:\n]|\b(?:and|or|but|that|which|who|whom|whose|if|when|while|because|than|to be|do|does|did"
    r"|can|could|will|would|should|may|might|must|has|have|had|it|they|he|she|you|I|we|called|known|there)\b))"
)
_WH = r"(?:In |To |At |On )?(?:What|Which|Who|Where|When|Why|How|which|what)\b"
# The subject of a sentence with one clause, and no pronoun: the new sentence begins with something else.
_SUBJECT = r"(?!(?:It|He|She|They|We|You|I|This|That|These|Those|There)\b)([A-Z](?:[^.;:!?\n]|\.(?=\w|,))*?)"
# Names, numbers and places: words that begin with no small letter, and the small words between them.
_NAMES = r"((?:(?:(?![a-z])\S+?|and|of|for|the|at|de|di|da|la|le|van|von|der|den|du|in|et|al)(?: |(?=\.$)))+)"
# Patterns of English questions -> the indirect form that follows an opener.
QUESTIONS = (
    # What is the symbol of gold? -> what the symbol of gold is
    (
        re.compile(
            rf"^(What|Who|Where) (is|are|was|were) {_SIMPLE}(?!.*\w+(?:ed|ing)\?$)((?:\S+ ){{0,7}}\S+)\?$"
        ),
        r"\1 \3 \2",
    ),
    # In which year was gold discovered? -> in which year gold was discovered
    (
        re.compile(rf"^({_WH}[^,?]*?) (is|are|was|were) {_SIMPLE}(.+) (\w+ed|found|made|born)\?$"),
        r"\1 \3 \2 \4",
    ),
    # Where does the name come from? -> where the name comes from
    (
        re.compile(rf"^({_WH}[^,?]*?) does {_SIMPLE}(.+) (come|belong|mean|live|work)( from| in)?\?$"),
        r"\1 \2 \3s\4",
    ),
    # Who discovered gold? -> who discovered gold
    (re.compile(r"^(Who \w+ed [^,;:?]+)\?$"), r"\1"),
)
ANSWERS = (
    # The symbol of gold is Au. -> Au is the symbol of gold.
    (re.compile(rf"^The ((?:\w+ ){{1,3}}of {_SUBJECT}) is {_NAMES}\.$"), r"\3 is the \1."),
    # Gold was discovered by Ann. -> Ann discovered gold.
    (re.compile(rf"^{_SUBJECT} (?:was|were) (\w+ed) by (?!\d){_NAMES}\.$"), r"\3 \2 \1."),
    # Gold was discovered in 1751. -> It was in 1751 that gold was discovered.
    (
        re.compile(rf"^{_SUBJECT} (was|were) (?!interested|involved|engaged)(\w+ed) in {_NAMES}\.$"),
        r"It was in \4 that \1 \2 \3.",
    ),
    # Gold belongs to group 11. -> It is group 11 to which gold belongs.
    (re.compile(rf"^{_SUBJECT} belongs to ([^.,;:]+)\.$"), r"It is \2 to which \1 belongs."),
    # The origin of the name gold: Saxon. -> Saxon: this is the origin of the name gold.
    (re.compile(r"^The (origin of [^:]+): (.+)\.$"), r"\2: this is the \1."),
)
_DETERMINER = re.compile(r"(?:The|An?|His|Her|Its|Their|Our|My|Your) ")


def propose(messages: Messages, count: int) -> Iterator[list[str]]:
    """Yield up to `count` candidates, each as the texts of its turns; none if no rule fits any turn.

    Each candidate opens the questions differently; the first, third and fifth also restate the answers.

    Example:
        >>> turns = [{"role": "user", "content": "Who discovered Gallium?"},
        ...          {"role": "assistant", "content": "Gallium was discovered by Lecoq."}]
        >>> list(propose(turns, 1))
        [['Tell me who discovered Gallium.', 'Lecoq discovered Gallium.']]
    """
    for ordinal in range(min(count, len(OPENERS))):
        texts = [_reword(m, OPENERS[ordinal], restated=ordinal % 2 == 0) for m in messages]
        if texts != [m["content"] for m in messages]:
            yield texts


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
                subject = found[1]
                small = subject[0].lower() + subject[1:] if _DETERMINER.match(subject) else subject
                return found.expand(template).replace(subject, small, 1)
    return text
