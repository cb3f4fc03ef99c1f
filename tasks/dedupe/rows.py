"""What deduplication compares of each row: its canonical text and digests of its content."""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pyarrow as pa

from nightshift.core.files import text_digest
from nightshift.core.workers import Work
from nightshift.data.prompts import list_prompts
from nightshift.data.text import canonical_messages
from tasks.dedupe.candidates import Text


class Row(NamedTuple):
    """One row of ingest.

    Attributes:
        id: Id of the row.
        origin: Origin of the row.
        text: Canonical text.
        prompts: Digests of the prompts by which the split connects it.
        content: Digest of the messages and tools before canonicalisation.
        group_id: Digest of the whole canonical text.
    """

    id: str
    origin: str
    text: Text
    prompts: list[str]
    content: str
    group_id: str


def start_reading() -> AbstractContextManager[Work[pa.RecordBatch, list[Row]]]:
    """Return `read_batches`, which needs nothing open."""
    return nullcontext(read_batches)


def read_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[list[Row]]:
    """Yield the rows of each batch, which has the columns id, messages, tools and origin."""
    for batch in batches:
        rows = []
        for row in batch.to_pylist():
            messages = row["messages"]
            turns = [canonical_messages([message]) for message in messages]
            text = join_turns(turns)
            content = text_digest(json.dumps(messages), row["tools"] or "")
            prompts, group_id = list_prompts(messages, turns), text_digest(text.whole)
            rows.append(Row(row["id"], row["origin"], text, prompts, content, group_id))
        yield rows


def join_turns(turns: list[str]) -> Text:
    """Join the canonical texts of the turns of a conversation, with the last answer separate.

    Example:
        >>> join_turns(["user who", "assistant me"])
        Text(prompt='user who', answer='assistant me')
    """
    return Text(" ".join(turns[:-1]), " ".join(turns[-1:]))
