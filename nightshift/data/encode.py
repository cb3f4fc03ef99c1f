"""Token ids and labels of a conversation, from the base model's chat template and tokenizer.

Only assistant turns, including their stop tokens, are labeled; in plain text every token is. Needs no
torch: transformers renders the template, and `tokenizers` tokenizes the text.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from nightshift.core.code_digest import source_digest, versions
from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json, text_digest
from nightshift.core.memo import Memo

IGNORED = -100
# Fallback date of Llama 3's templates. With a fixed date, a row has the same tokens every night.
DATE = "26 Jul 2024"
# Reason why a conversation cannot be encoded -> fix.
FAULTS = {
    "template_fails": "fix the turns to match the base's chat template",
    "template_drops_turn": "the base's chat template omits part of the conversation; use another template",
    "template_changes_turns": "the base's chat template changes earlier turns; use another template",
    "no_supervised_token": "add text to the assistant turn",
}
Message = Mapping[str, Any]
Conversation = tuple[Sequence[Message], str | None]
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized conversation: ids and labels, shape (n_tokens,), int32; -100 means no label."""

    input_ids: Ids
    labels: Ids


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


def open_memo(encoder: Encoder) -> Memo:
    """Open the cache of token ids for this code, tokenizer and template."""
    engines = versions("jinja2", "numpy", "tokenizers", "transformers")
    code = source_digest("nightshift/data/encode.py")
    return Memo("tokens", {"code": code, "engines": engines, "tokenizer": encoder.digest})


def encode_known(conversations: Sequence[Conversation], encoder: Encoder, memo: Memo) -> list[Encoded | str]:
    """Encode conversations, each of them once in the lifetime of the cache.

    Returns:
        For each conversation, in order: its tokens, or the reason for failure (see `FAULTS`).
    """
    keys = [_key(*conversation) for conversation in conversations]
    known: dict[str, Encoded | str] = {
        key: _from_bytes(value) for key, value in memo.read(list(dict.fromkeys(keys))).items()
    }
    new = {key: one for key, one in zip(keys, conversations, strict=True) if key not in known}
    encoded = dict(zip(new, encode_batch(list(new.values()), encoder), strict=True))
    memo.write((key, _to_bytes(one)) for key, one in encoded.items() if isinstance(one, Encoded))
    known |= encoded
    return [known[key] for key in keys]


def encode_batch(conversations: Sequence[Conversation], encoder: Encoder) -> list[Encoded | str]:
    """Render, tokenize on all CPU cores, and label.

    Args:
        conversations: (messages, tools as JSON or None); see `nightshift.data.schemas`.
        encoder: Tokenizer and chat template of the base model.

    Returns:
        For each conversation, in order: its tokens, or the reason for failure (see `FAULTS`).
    """
    rendered = [render(messages, tools, encoder) for messages, tools in conversations]
    texts = [one[0] for one in rendered if not isinstance(one, str)]
    tokens = iter(encoder.tokenizer.encode_batch(texts, add_special_tokens=False))
    return [
        one
        if isinstance(one, str)
        else _label(next(tokens), one[1], encoder.stop_id if messages[0]["role"] == "text" else None)
        for one, (messages, _) in zip(rendered, conversations, strict=True)
    ]


def render(
    messages: Sequence[Message], tools: str | None, encoder: Encoder
) -> tuple[str, list[tuple[int, int]]] | str:
    """Render a conversation and locate the assistant's turns in the text.

    Returns:
        The text and, for each assistant turn, first and last + 1 character of its content and stop
        token; or a reason from `FAULTS`.
    """
    if messages[0]["role"] == "text":
        return messages[0]["content"], [(0, len(messages[0]["content"]))]
    turns = [_turn(message) for message in messages]
    functions = json.loads(tools) if tools else None
    try:
        text = _apply(turns, functions, encoder)
        prefixes = [
            (_apply(turns[:i], functions, encoder, prompt=True), _apply(turns[: i + 1], functions, encoder))
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant" and turn.get("train") is not False
        ]
    except (jinja2.TemplateError, TypeError, ValueError) as err:
        logging.getLogger(__name__).debug("template: %s", err)
        return "template_fails"
    if not all(part in text for turn in turns for part in _parts(turn)):
        return "template_drops_turn"
    if not all(text.startswith(after) and after.startswith(before) for before, after in prefixes):
        return "template_changes_turns"
    # The model does not generate the text after the stop token (a line break in ChatML).
    return text, [(len(before), len(after.rstrip())) for before, after in prefixes]


def count_supervised(labels: Sequence[int] | Ids) -> int:
    """Count the labeled tokens.

    Example:
        >>> count_supervised([-100, 5, 6])
        2
    """
    return int(np.count_nonzero(np.asarray(labels) != IGNORED))


def _apply(
    turns: list[dict[str, Any]],
    functions: list[Any] | None,
    encoder: Encoder,
    *,
    prompt: bool = False,
) -> str:
    """Render turns like `apply_chat_template` of transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        [turns],
        tools=functions,
        chat_template=encoder.template,
        add_generation_prompt=prompt,
        date_string=DATE,
        **encoder.special_tokens,
    )
    return str(text)


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


def _label(tokens: Any, spans: list[tuple[int, int]], stop_id: int | None) -> Encoded | str:
    """Label the tokens inside the spans; append the stop token if there is one."""
    ids = np.array(tokens.ids, dtype=np.int32)
    offsets = np.array(tokens.offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        inside |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    if not inside.any():
        return "no_supervised_token"
    labels = np.where(inside, ids, np.int32(IGNORED))
    if stop_id is not None:
        ids, labels = np.append(ids, np.int32(stop_id)), np.append(labels, np.int32(stop_id))
    return Encoded(ids, labels)


def _key(messages: Sequence[Message], tools: str | None) -> str:
    """Return the cache key of a conversation: everything its tokens depend on besides the tokenizer."""
    values = chain.from_iterable(
        (m["role"], m["content"], m.get("tool_calls") or "", m.get("name") or "", str(m.get("train")))
        for m in messages
    )
    return text_digest(tools or "", *values, size=16)


def _to_bytes(encoded: Encoded) -> bytes:
    inside: NDArray[np.bool_] = encoded.labels != IGNORED
    return encoded.input_ids.tobytes() + inside.tobytes()


def _from_bytes(value: bytes) -> Encoded:
    count = len(value) // 5
    ids = np.frombuffer(value, dtype=np.int32, count=count)
    inside = np.frombuffer(value, dtype=bool, offset=4 * count)
    return Encoded(ids, np.where(inside, ids, np.int32(IGNORED)))


def _content(value: object) -> str:
    """Return a special token, which the file stores as text or as {"content": text}."""
    return str(value["content"]) if isinstance(value, dict) else str(value)
