"""Token ids and labels of a conversation, from the base model's chat template and tokenizer.

Only assistant turns, including their stop tokens, are labeled; in plain text every token is. A conversation
has one sequence of tokens, or one for each answer (see `nightshift.data.template`). Needs no torch:
transformers renders the template, and `tokenizers` tokenizes the text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json, text_digest
from nightshift.data.faults import FAULTS
from nightshift.data.template import (
    TEMPLATE_ERRORS,
    Template,
    drops_tools,
    freeze_dates,
    is_answer,
    load_template,
    make_chat,
    reasoning_of,
    render_answers,
    visible,
)
from nightshift.data.tokenizer import Ids, Tokens, find_tokens

IGNORED = -100
SPACE = re.compile(r"\s*")
# Forms of a turn that calls tools: whether empty content is null, and whether arguments are JSON text.
FORMS = ((False, False), (True, False), (True, True), (False, True))
Message = Mapping[str, Any]
# Messages, and tools as JSON.
Conversation = tuple[Sequence[Message], str | None]


class Fault(NamedTuple):
    """Why a conversation cannot be encoded: a reason from `FAULTS`, and what the chat template says."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        """Return the reason with the remedy."""
        return "; ".join(filter(None, [self.reason, self.detail, FAULTS[self.reason]]))


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
        template: Chat template, if the base has one.
        stop_id: Id of the end-of-sequence token, which ends a plain text.
        start_id: Id of the beginning-of-sequence token, with which a plain text starts; None if the tokenizer
            adds none.
        digest: Digest of everything that token ids depend on.
    """

    tokenizer: Any
    template: Template | None
    stop_id: int
    start_id: int | None
    digest: str


def load_encoder(folder: Path) -> Encoder:
    """Load tokenizer.json and the chat template from a model folder.

    Raises:
        DataError: A file or the end-of-sequence token is missing, or the template prints today's date.
    """
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: not found; run `dvc repro base`")
    config = read_json(files[1])
    own = folder / "chat_template.jinja"
    source = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    special = {key: _content(value) for key, value in config.items() if key.endswith("_token") and value}
    tokenizer = Tokenizer.from_file(str(files[0]))
    stop_id = tokenizer.token_to_id(special.get("eos_token", ""))
    if stop_id is None:
        raise DataError(f"{folder}: the tokenizer has no eos_token; set base.special_tokens")
    if source and "strftime_now(" in freeze_dates(source):
        raise DataError(
            f"{folder}: the chat template prints today's date, so a row would have different tokens every "
            "night; set base.chat_template to a copy with a fixed date"
        )
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    start_id = tokenizer.token_to_id(special.get("bos_token", ""))
    starts = start_id is not None and tokenizer.encode("a").ids[:1] == [start_id]
    return Encoder(
        tokenizer,
        load_template(source, special, added) if source else None,
        stop_id=stop_id,
        start_id=start_id if starts else None,
        digest=text_digest(file_digest(files[0]), source or "", json.dumps(special, sort_keys=True), size=16),
    )


def encode_batch(conversations: Sequence[Conversation], encoder: Encoder) -> list[list[Encoded] | Fault]:
    """Render, tokenize on all CPU cores, and label.

    Args:
        conversations: (messages, tools as JSON or None); see `nightshift.data.schemas`.
        encoder: Tokenizer and chat template of the base model.

    Returns:
        For each conversation, in order: its sequences of tokens, or the reason for failure (see `FAULTS`).
    """
    rendered = [render(messages, tools, encoder) for messages, tools in conversations]
    return label_all(rendered, tokenize(rendered, encoder), encoder)


def tokenize(rendered: Sequence[Sequence[Rendered] | Fault], encoder: Encoder) -> list[Tokens]:
    """Tokenize the texts of the rendered conversations."""
    texts = [one.text for ones in rendered if not isinstance(ones, Fault) for one in ones]
    return find_tokens(encoder.tokenizer, texts)


def label_all(
    rendered: Sequence[Sequence[Rendered] | Fault], tokens: Sequence[Any], encoder: Encoder
) -> list[list[Encoded] | Fault]:
    """Label the tokens of the rendered conversations; a reason for failure stays."""
    remaining = iter(tokens)
    return [ones if isinstance(ones, Fault) else _label_parts(ones, remaining, encoder) for ones in rendered]


def render(messages: Sequence[Message], tools: str | None, encoder: Encoder) -> list[Rendered] | Fault:
    """Render a conversation, and locate the assistant's turns in the text.

    Templates expect calls in different forms: arguments as an object or as JSON, and the content of a turn
    that only calls tools empty or null. The first form that is rendered completely applies.

    Returns:
        One text with all answers, or one text for each of them; or the reason why there is none.
    """
    if messages[0]["role"] == "text":
        return [Rendered(messages[0]["content"], [(0, len(messages[0]["content"]))], [])]
    if encoder.template is None:
        return Fault("no_chat_template")
    turns = [_turn(message) for message in messages]
    faults: list[Fault] = []
    for form in FORMS if any("tool_calls" in turn for turn in turns) else FORMS[:1]:
        rendered = _render(encoder.template, tools, [_with_form(turn, *form) for turn in turns])
        if not isinstance(rendered, Fault):
            return rendered
        faults.append(rendered)
    return next((fault for fault in faults if fault.reason != "template_fails"), faults[0])


def _render(template: Template, tools: str | None, turns: Sequence[dict[str, Any]]) -> list[Rendered] | Fault:
    """Render turns in the form that templates expect."""
    try:
        chat = make_chat(template, json.loads(tools) if tools else None, turns)
        parts = render_answers(chat)
        if (tools or any("tool_calls" in turn for turn in turns)) and drops_tools(chat):
            return Fault("template_drops_tools")
    except TEMPLATE_ERRORS as err:
        return Fault("template_fails", str(err).partition("\n")[0][:200])
    if parts is None:
        return Fault("template_changes_turns")
    for part in parts:
        shown = chat.turns[: part.n_turns]
        if not all(visible(turn, template) in part.text for turn in shown):
            return Fault("template_drops_turn")
        trained = shown if len(parts) == 1 else shown[-1:]
        if template.has_reasoning and not all(
            piece in part.text for turn in trained if is_answer(turn) for piece in reasoning_of(turn)
        ):
            return Fault("template_drops_reasoning")
    return [
        Rendered(text, answers, _find_rounds(turns[:n_turns], answers, text) if is_divisible else [0])
        for text, answers, n_turns, is_divisible in parts
    ]


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


def _with_form(turn: dict[str, Any], has_null: bool, is_json: bool) -> dict[str, Any]:  # noqa: FBT001
    """Return a turn with its calls in one of the `FORMS`."""
    if "tool_calls" not in turn:
        return turn
    calls = turn["tool_calls"]
    if is_json:
        functions = [call["function"] for call in calls]
        texts = [json.dumps(one["arguments"], ensure_ascii=False) for one in functions]
        calls = [
            {"type": "function", "function": {**one, "arguments": text}}
            for one, text in zip(functions, texts, strict=True)
        ]
    return {**turn, "tool_calls": calls, "content": turn["content"] or (None if has_null else "")}


def _find_rounds(
    turns: Sequence[Mapping[str, Any]], answers: Sequence[tuple[int, int]], text: str
) -> list[int]:
    """Return the first character of each round; the white space after an answer belongs to its round."""
    following = [after["role"] for turn, after in pairwise(turns) if is_answer(turn)]
    ends = [end for (_, end), role in zip(answers, following, strict=False) if role != "tool"]
    return [0, *(SPACE.match(text, end).end() for end in ends)]  # type: ignore[union-attr]


def _label_parts(
    parts: Sequence[Rendered], tokens: Iterator[Tokens], encoder: Encoder
) -> list[Encoded] | Fault:
    """Label all texts of a conversation; the first reason for failure is that of the conversation."""
    labelled = [_label(next(tokens), part, encoder) for part in parts]
    faults = [one for one in labelled if isinstance(one, Fault)]
    return faults[0] if faults else [one for one in labelled if isinstance(one, Encoded)]


def _label(tokens: Tokens, rendered: Rendered, encoder: Encoder) -> Encoded | Fault:
    """Label the tokens inside the answers; a plain text gets the start and stop tokens."""
    ids = tokens.ids
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for start, end in rendered.answers:
        edge = SPACE.match(rendered.text, end).end()  # type: ignore[union-attr]
        for inside in tokens.inside(start, end, edge):
            labels[inside] = ids[inside]
    if not count_supervised(labels):
        return Fault("no_supervised_token")
    if not rendered.rounds:
        first: list[int] = [] if encoder.start_id is None else [encoder.start_id]
        ids = np.array([*first, *ids, encoder.stop_id], dtype=np.int32)
        labels = np.array([*([IGNORED] * len(first)), *labels, encoder.stop_id], dtype=np.int32)
        return Encoded(ids, labels)
    rounds = [tokens.find(start) for start in rendered.rounds]
    return Encoded(ids, labels, np.array(rounds, dtype=np.int32))


def _content(value: object) -> str:
    """Return a special token, which the file stores as text or as {"content": text}."""
    return str(value["content"]) if isinstance(value, dict) else str(value)
