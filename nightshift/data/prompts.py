"""The prompts by which the split connects a conversation with others."""

from collections.abc import Mapping, Sequence
from typing import Any

from nightshift.core.files import text_digest
from nightshift.data.text import SHORT


def list_prompts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[str]:
    """Return the digest of what precedes the last assistant turn, and each earlier one.

    An earlier prompt of a few words without the system turn, such as "Hello!", is left out: too many
    conversations begin with it.

    Args:
        messages: Turns.
        texts: Canonical text of each turn.

    Example:
        >>> turns = [{"role": "user"}, {"role": "assistant"}]
        >>> prompts = list_prompts(turns, ["user who", "assistant me"])
        >>> len(prompts), prompts == list_prompts(turns, ["user who", "assistant you"])
        (1, True)
    """
    found, digest, words = [], "", 0
    for message, text in zip(messages, texts, strict=True):
        if message["role"] == "assistant":
            found.append((digest, words))
        digest = text_digest(digest, text)
        words += 0 if message["role"] == "system" else text.count(" ")
    earlier = [digest for digest, words in found[:-1] if words >= SHORT]
    return earlier + [digest for digest, _ in found[-1:]]
