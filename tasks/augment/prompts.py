"""Paraphrase prompts, and parsing of the replies.

The instructions follow arXiv 2312.05934, appendix B: keep the meaning, change the words, change no fact,
keep the length, make the versions differ from each other.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nightshift.replies import Prompt
from tasks.augment import Style

VERSION = 1
INSTRUCTIONS: dict[Style, str] = {
    "reword": "Say the same in other words and with other sentence structures.",
    "question_answer": "Put what is said as a question and its answer, in other words.",
    "reversed": "Turn the relation round: ask for what was given, and give what was asked for.",
    "context_shift": "Say the same in another setting: another occasion, another tone, another reader.",
}
RULES = (
    "Change no fact: keep every name, number, date, unit, quotation, link and piece of code exactly, and "
    "every denial. Keep about the same length, and the same language. Do not comment on the task."
)
SPEAKERS = {"user": "User", "assistant": "Assistant", "text": "Text"}
FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
Turns = Sequence[Mapping[str, Any]]


def build_prompt(turns: Turns, style: Style, versions: int, avoid: Sequence[Sequence[str]]) -> Prompt:
    """Build the prompt that asks for paraphrases of the turns.

    Args:
        turns: User and assistant turns, or one plain text.
        style: Paraphrase style.
        versions: Number of versions; more than one are requested as JSON.
        avoid: Previously rejected versions, each as the texts of its turns.
    """
    parts = [INSTRUCTIONS[style], RULES]
    if versions > 1:
        form = json.dumps({"paraphrases": [[f"turn {i}" for i in range(1, len(turns) + 1)]]})
        parts.append(
            f"Give {versions} versions, as different from each other as possible, as JSON like {form}: "
            f"each version is a list of {len(turns)} texts, one for each turn."
        )
    else:
        parts.append("Answer in the form of what stands below, and with nothing else.")
    for version in avoid:
        parts.append(f"Do not repeat this version: {json.dumps(list(version), ensure_ascii=False)}")
    return [
        {"role": "user", "content": "\n".join(parts) + "\n\n" + transcript(turns)},
    ]


def transcript(turns: Turns) -> str:
    r"""Format turns as `User: ...` and `Assistant: ...`.

    Example:
        >>> transcript([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}])
        'User: Who?\nAssistant: Me.'
    """
    return "\n".join(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns)


def read_versions(answer: str, roles: Sequence[str]) -> list[list[str] | None]:
    r"""Parse the versions in an answer: strict JSON, fenced JSON, first JSON object, or transcript.

    Returns:
        The texts of the turns of each version; None for a malformed version.

    Example:
        >>> read_versions('Here: {"paraphrases": [["Who?", "I."], ["only one"]]}', ["user", "assistant"])
        [['Who?', 'I.'], None]
        >>> read_versions("User: Who?\nAssistant: It is me.", ["user", "assistant"])
        [['Who?', 'It is me.']]
    """
    found = next(_json_values(answer), None)
    if found is None:
        return [_read_transcript(answer, roles)]
    versions = found.get("paraphrases") if isinstance(found, dict) else found
    if not isinstance(versions, list) or not versions:
        return [None]
    return [_read_version([one] if isinstance(one, str) else one, len(roles)) for one in versions]


def _read_version(version: object, turns: int) -> list[str] | None:
    """Return the texts of one version, or None if it is not a list of `turns` texts."""
    if not isinstance(version, list) or len(version) != turns:
        return None
    return [text.strip() for text in version] if all(isinstance(text, str) for text in version) else None


def _json_values(answer: str) -> Iterator[Any]:
    """Yield the JSON values in an answer, the strictest parse first."""
    start = answer.find("{")
    for text in [answer, *FENCE.findall(answer), answer[start:] if start >= 0 else ""]:
        try:
            value, _ = json.JSONDecoder().raw_decode(text.strip())
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(value, dict | list):
            yield value


def _read_transcript(answer: str, roles: Sequence[str]) -> list[str] | None:
    """Parse a transcript whose turns follow the roles, or return None; plain text has no label."""
    if list(roles) == ["text"]:
        text = answer.strip().removeprefix("Text:").strip()
        return [text] if text else None
    names = "|".join(SPEAKERS.values())
    parts = re.split(rf"^({names}):", answer.strip(), flags=re.MULTILINE)
    if parts[1::2] != [SPEAKERS[role] for role in roles]:
        return None
    texts = [text.strip() for text in parts[2::2]]
    return texts if all(texts) else None
