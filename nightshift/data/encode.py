"""Token ids and labels of a conversation, from the base model's chat template and tokenizer.

Only assistant turns, including their stop tokens, are labeled; in plain text every token is. Needs no
torch: transformers renders the template, and `tokenizers` tokenizes the text.
"""

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json, text_digest
from nightshift.data.template import is_answer, locate_answers, make_chat

IGNORED = -100
# Reason why a conversation cannot be encoded -> fix.
FAULTS = {
    "template_fails": "fix the turns to match the base's chat template",
    "template_drops_turn": "the base's chat template omits part of the conversation; use another template",
    "template_changes_turns": "the base's chat template changes earlier turns; use another template",
    "no_supervised_token": "add text to the assistant turn",
}
# A character has at most this many tokens, with a prefix space.
UNORDERED = 6
SPACE = re.compile(r"\s*")
Message = Mapping[str, Any]
# Messages, and tools as JSON.
Conversation = tuple[Sequence[Message], str | None]
Ids = NDArray[np.int32]


class Rendered(NamedTuple):
    """A rendered conversation, with positions in characters.

    Attributes:
        text: The text.
        answers: First and last + 1 character of each supervised part: an assistant turn's content and stop
            token, or a whole plain text.
        rounds: First character of each round, which starts with a user turn (the first with the text) and
            ends with the assistant turn before the next one; empty for a plain text.
    """

    text: str
    answers: list[tuple[int, int]]
    rounds: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized conversation.

    Attributes:
        input_ids: Token ids, shape (n_tokens,), int32.
        labels: Labels, shape (n_tokens,), int32; -100 means no label.
        rounds: First token of each round, shape (n_rounds,), int32; empty for a plain text.
    """

    input_ids: Ids
    labels: Ids
    rounds: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int32))


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: `tokenizers.Tokenizer`.
        template: Jinja source of the chat template.
        special_tokens: bos_token, eos_token and others, by their names in the template.
        stop_id: Id of the end-of-sequence token, which ends a plain text.
        digest: Digest of everything that token ids depend on.
    """

    tokenizer: Any
    template: str
    special_tokens: dict[str, str]
    stop_id: int
    digest: str


def load_encoder(folder: Path) -> Encoder:
    """Load tokenizer.json and the chat template from a model folder.

    Raises:
        DataError: A file, the chat template or the end-of-sequence token is missing, or the template
            always prints today's date.
    """
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: not found; run `dvc repro base`")
    config = read_json(files[1])
    own = folder / "chat_template.jinja"
    template = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    special = {key: _content(value) for key, value in config.items() if key.endswith("_token") and value}
    tokenizer = Tokenizer.from_file(str(files[0]))
    stop_id = tokenizer.token_to_id(special.get("eos_token", ""))
    if not isinstance(template, str) or stop_id is None:
        raise DataError(f"{folder}: needs a chat template and an eos_token; use an instruction-tuned base")
    if "strftime_now" in template and "date_string" not in template:
        raise DataError(
            f"{folder}: the chat template prints today's date, so a row would have different tokens every "
            "night; use a copy of the template with a fixed date"
        )
    return Encoder(
        tokenizer,
        template,
        special,
        stop_id=stop_id,
        digest=text_digest(file_digest(files[0]), template, json.dumps(special, sort_keys=True), size=16),
    )


def encode_batch(conversations: Sequence[Conversation], encoder: Encoder) -> list[Encoded | str]:
    """Render, tokenize on all CPU cores, and label.

    Args:
        conversations: (messages, tools as JSON or None); see `nightshift.data.schemas`.
        encoder: Tokenizer and chat template of the base model.

    Returns:
        For each conversation, in order: its tokens, or the reason for failure (see `FAULTS`).
    """
    rendered = [render(messages, tools, encoder) for messages, tools in conversations]
    return label_all(rendered, tokenize(rendered, encoder), encoder)


def tokenize(rendered: Sequence[Rendered | str], encoder: Encoder) -> list[Any]:
    """Tokenize the rendered conversations."""
    texts = [one.text for one in rendered if isinstance(one, Rendered)]
    tokens: list[Any] = encoder.tokenizer.encode_batch(texts, add_special_tokens=False)
    return tokens


def label_all(
    rendered: Sequence[Rendered | str], tokens: Sequence[Any], encoder: Encoder
) -> list[Encoded | str]:
    """Label the tokens of the rendered conversations; a reason for failure stays."""
    remaining = iter(tokens)
    return [
        one if isinstance(one, str) else _label(next(remaining), one, encoder.stop_id) for one in rendered
    ]


def render(messages: Sequence[Message], tools: str | None, encoder: Encoder) -> Rendered | str:
    """Render a conversation, and locate the assistant's turns in the text.

    Returns:
        The text with its answers, or a reason from `FAULTS`.
    """
    if messages[0]["role"] == "text":
        return Rendered(messages[0]["content"], [(0, len(messages[0]["content"]))], [])
    turns = [_turn(message) for message in messages]
    try:
        functions = json.loads(tools) if tools else None
        chat = make_chat(encoder.template, encoder.special_tokens, functions, turns)
        text = chat.render()
        answers = locate_answers(chat, text)
    except (jinja2.TemplateError, TypeError, ValueError) as err:
        logging.getLogger(__name__).debug("template: %s", err)
        return "template_fails"
    if not all(part in text for turn in turns for part in _parts(turn)):
        return "template_drops_turn"
    if answers is None:
        return "template_changes_turns"
    return Rendered(text, answers, _find_rounds(turns, answers, text))


def count_supervised(labels: Sequence[int] | Ids) -> int:
    """Count the labeled tokens.

    Example:
        >>> count_supervised([-100, 5, 6])
        2
    """
    return int(np.count_nonzero(np.asarray(labels) != IGNORED))


def _turn(message: Message) -> dict[str, Any]:
    """Return a turn in the form that templates expect: no empty fields, tool calls in OpenAI format."""
    turn = {key: value for key, value in message.items() if value is not None}
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [{"type": "function", "function": call} for call in json.loads(calls)]
    return turn


def _parts(turn: Mapping[str, Any]) -> Iterator[str]:
    """Yield the strings of a turn that the rendered text must contain."""
    yield turn["content"].strip()
    yield from (call["function"]["name"] for call in turn.get("tool_calls", ()))


def _find_rounds(
    turns: Sequence[Mapping[str, Any]], answers: Sequence[tuple[int, int]], text: str
) -> list[int]:
    """Return the first character of each round; the white space after an answer belongs to its round."""
    following = [after["role"] for turn, after in pairwise(turns) if is_answer(turn)]
    ends = [end for (_, end), role in zip(answers, following, strict=False) if role != "tool"]
    return [0, *(SPACE.match(text, end).end() for end in ends)]  # type: ignore[union-attr]


def _label(tokens: Any, rendered: Rendered, stop_id: int) -> Encoded | str:
    """Label the tokens inside the answers; a plain text ends with the stop token."""
    ids = np.array(tokens.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for start, end in rendered.answers:
        inside = _find_inside(tokens, start, end)
        labels[inside] = ids[inside]
    if not count_supervised(labels):
        return "no_supervised_token"
    if not rendered.rounds:
        return Encoded(np.append(ids, np.int32(stop_id)), np.append(labels, np.int32(stop_id)))
    rounds = [_find_token(tokens, start, 0) for start in rendered.rounds]
    return Encoded(ids, labels, np.array(rounds, dtype=np.int32))


def _find_inside(tokens: Any, start: int, end: int) -> list[int]:
    """Return the tokens between two characters, without reading the offsets of all tokens.

    Offsets are in order, except that of a prefix space, which may be after the bytes of its character.
    """
    count = len(tokens)
    first, stop = _find_token(tokens, start, 0), _find_token(tokens, end + 1, 1)
    edges = {*range(first - UNORDERED, first + UNORDERED), *range(stop - UNORDERED, stop + UNORDERED)}
    checked = [tokens.token_to_chars(i) if 0 <= i < count else (-1, -1) for i in edges]
    inside = [i for i, (low, high) in zip(edges, checked, strict=True) if low >= start and high <= end]
    return [*inside, *range(first + UNORDERED, stop - UNORDERED)]


def _find_token(tokens: Any, position: int, side: int) -> int:
    """Return the first token that starts (side 0) or ends (side 1) at a character or after it."""
    return bisect_left(range(len(tokens)), position, key=lambda i: tokens.token_to_chars(i)[side])


def _content(value: object) -> str:
    """Return a special token, which the file stores as text or as {"content": text}."""
    return str(value["content"]) if isinstance(value, dict) else str(value)
