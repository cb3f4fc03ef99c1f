"""Token ids and labels of any number of conversations, cached by content."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from nightshift.core.code_digest import source_digest, versions
from nightshift.core.files import text_digest
from nightshift.core.memo import Memo
from nightshift.data.encode import (
    IGNORED,
    Conversation,
    Encoded,
    Encoder,
    Fault,
    Message,
    label_all,
    render,
    tokenize,
)

# A batch is full at this many conversations or characters, whichever comes first. The tokenizer's result
# has more than 100 bytes per token.
BATCH_ROWS = 1000
BATCH_CHARACTERS = 2 * 2**20
Item = TypeVar("Item")
Sequences = list[Encoded]


def open_memo(encoder: Encoder) -> Memo:
    """Open the cache of token ids for this code, tokenizer and template."""
    engines = versions("fastokens", "jinja2", "numpy", "tokenizers", "transformers")
    modules = ("chat_templates", "encode", "template", "tokenizer", "tokens")
    code = source_digest(*(f"nightshift/data/{name}.py" for name in modules))
    return Memo("tokens", {"code": code, "engines": engines, "tokenizer": encoder.digest})


def encode_stream(
    items: Iterable[tuple[Item, Conversation | None]], encoder: Encoder, memo: Memo
) -> Iterator[tuple[Item, Sequences | Fault | None]]:
    """Encode a stream of conversations, each of them once in the lifetime of the cache.

    One batch is tokenized in a thread, which runs on all CPU cores without the interpreter lock, while the
    next is read and rendered. Two batches are in memory.

    Args:
        items: Any value, and its conversation or None.
        encoder: Tokenizer and chat template of the base model.
        memo: Cache from `open_memo`.

    Yields:
        Each value in order, with the sequences of its conversation or why it cannot be encoded, or None
        without a conversation.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        finish: Callable[[], Iterator[tuple[Item, Sequences | Fault | None]]] | None = None
        for batch in _batches(items):
            following = _begin(batch, encoder, memo, thread)
            if finish:
                yield from finish()
            finish = following
        if finish:
            yield from finish()


def encode_known(
    conversations: Sequence[Conversation], encoder: Encoder, memo: Memo
) -> list[Sequences | Fault]:
    """Encode conversations like `encode_stream`, and return the results in order."""
    stream = encode_stream(((None, conversation) for conversation in conversations), encoder, memo)
    return [one for _, one in stream if one is not None]


def _batches(
    items: Iterable[tuple[Item, Conversation | None]],
) -> Iterator[list[tuple[Item, Conversation | None]]]:
    """Group items into batches by count and size, in order."""
    batch: list[tuple[Item, Conversation | None]] = []
    size = 0
    for item, conversation in items:
        batch.append((item, conversation))
        size += sum(len(message["content"]) for message in conversation[0]) if conversation else 0
        if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _begin(
    batch: Sequence[tuple[Item, Conversation | None]], encoder: Encoder, memo: Memo, thread: Executor
) -> Callable[[], Iterator[tuple[Item, Sequences | Fault | None]]]:
    """Render the new conversations of a batch, start to tokenize them, and return how to finish."""
    keys = [_key(*conversation) if conversation else "" for _, conversation in batch]
    conversations = {key: one for key, (_, one) in zip(keys, batch, strict=True) if one}
    known: dict[str, Sequences | Fault] = {
        key: _from_bytes(value) for key, value in memo.read(list(conversations)).items()
    }
    new = {key: render(*one, encoder) for key, one in conversations.items() if key not in known}
    tokens = thread.submit(tokenize, list(new.values()), encoder)

    def finish() -> Iterator[tuple[Item, Sequences | Fault | None]]:
        encoded = dict(zip(new, label_all(list(new.values()), tokens.result(), encoder), strict=True))
        memo.write((key, _to_bytes(one)) for key, one in encoded.items() if not isinstance(one, Fault))
        known.update(encoded)
        for (item, _), key in zip(batch, keys, strict=True):
            yield item, known.get(key)

    return finish


def _key(messages: Sequence[Message], tools: str | None) -> str:
    """Return the cache key of a conversation: everything its tokens depend on besides the tokenizer."""
    values = chain.from_iterable(
        (
            *(m["role"], m["content"], m.get("reasoning") or "", m.get("tool_calls") or ""),
            *(m.get("name") or "", str(m.get("train"))),
        )
        for m in messages
    )
    return text_digest(tools or "", *values, size=16)


def _to_bytes(sequences: Sequences) -> bytes:
    """Return int32 values: the number of values of each sequence and those values, one after the other.

    The values of a sequence: numbers of rounds and edges, rounds, edges of the labelled parts, token ids.
    """
    values: list[Any] = []
    for one in sequences:
        inside = np.zeros(len(one.labels) + 2, dtype=bool)
        np.not_equal(one.labels, IGNORED, out=inside[1:-1])
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        counts = [len(one.rounds), len(edges)]
        parts: list[Any] = [counts, one.rounds, edges, one.input_ids]
        values += [[sum(len(part) for part in parts)], *parts]
    return np.concatenate(values, dtype=np.int32).tobytes()


def _from_bytes(value: bytes) -> Sequences:
    """Reverse `_to_bytes`."""
    values = np.frombuffer(value, dtype=np.int32)
    sequences = []
    while len(values):
        count, n_rounds, n_edges = values[:3].tolist()
        one, values = values[3 : 1 + count], values[1 + count :]
        rounds, edges, ids = one[:n_rounds], one[n_rounds : n_rounds + n_edges], one[n_rounds + n_edges :]
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        for start, stop in edges.reshape(-1, 2).tolist():
            labels[start:stop] = ids[start:stop]
        sequences.append(Encoded(ids, labels, rounds))
    return sequences
