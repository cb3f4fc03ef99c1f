"""Rows of preference tuning: the tokens of each prompt and of its answers, as TRL's collators read them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from nightshift.core.files import atomic_write, iterate_rows
from nightshift.data.drops import Drops
from nightshift.data.encode import IGNORED, Conversation, Encoded, Encoder, Fault
from nightshift.data.tokenizer import Ids
from nightshift.data.tokens import encode_stream, open_memo

TOKENS = pa.list_(pa.int32())
# TRL's columns of each method, and the number of the row.
SCHEMAS = {
    "dpo": pa.schema(
        [("row", pa.int32()), ("prompt_ids", TOKENS), ("chosen_ids", TOKENS), ("rejected_ids", TOKENS)]
    ),
    "kto": pa.schema(
        [("row", pa.int32()), ("prompt_ids", TOKENS), ("completion_ids", TOKENS), ("label", pa.bool_())]
    ),
}
# Columns with the answers of a row.
ANSWERS = {"dpo": ("chosen_ids", "rejected_ids"), "kto": ("completion_ids",)}
# Number of the row that completes a batch of an evaluation, or of a step whose rows are skipped.
NO_ROW = -1
NAMES = ("chosen", "rejected")
Row = Mapping[str, Any]


@dataclass(slots=True)
class Rows:
    """Encoded comparisons of one split.

    Attributes:
        method: dpo: a row is a pair. kto: a row is an answer.
        rows: Rows with the columns of `SCHEMAS`.
        drops: Comparisons read and left out.
    """

    method: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    drops: Drops = field(default_factory=Drops)

    @property
    def lengths(self) -> list[list[int]]:
        """Return the tokens of the sequences of each row, shape (n_rows, 2) for dpo, (n_rows, 1) for kto."""
        names = ANSWERS[self.method]
        return [[len(row["prompt_ids"]) + len(row[name]) for name in names] for row in self.rows]

    @property
    def labelled(self) -> list[int]:
        """Return the tokens of the answers of each row, shape (n_rows,)."""
        return [sum(len(row[name]) for name in ANSWERS[self.method]) for row in self.rows]


def read_comparisons(path: Path, encoder: Encoder, side: str, method: str, max_length: int) -> Rows:
    """Encode the comparisons of one split.

    Args:
        path: Comparisons with their sides.
        encoder: Tokenizer and chat template of the base.
        side: train or validation.
        method: dpo or kto.
        max_length: Maximum tokens of a prompt with an answer.
    """
    found = Rows(method)
    rows = (row for row in iterate_rows(path) if row["side"] == side)
    with open_memo(encoder) as memo:
        encoded = encode_stream(conversations(rows), encoder, memo)
        for row, good in encoded:
            _, bad = next(encoded)
            source = row["origin"].split("/", 1)[0]
            found.drops.read[source] += 1
            made = (
                make_pair(good, bad, max_length) if method == "dpo" else make_answers(good, bad, max_length)
            )
            if isinstance(made, str):
                found.drops.add(source, made.partition(";")[0], f"{row['origin']}: {made}")
                continue
            found.rows += [{"row": len(found.rows) + number, **one} for number, one in enumerate(made)]
    return found


def conversations(rows: Iterable[Row]) -> Iterator[tuple[Row, Conversation | None]]:
    """Yield each row twice: with its prompt and the good answer, and with the bad one; None without it."""
    for row in rows:
        prompt = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in row["prompt"]]
        for name in NAMES:
            yield row, ([*prompt, *row[name]], row["tools"]) if row[name] else None


def make_pair(
    good: Sequence[Encoded] | Fault | None, bad: Sequence[Encoded] | Fault | None, max_length: int
) -> list[dict[str, Any]] | str:
    """Return the row of a pair, or why there is none.

    Args:
        good: Sequences of tokens of the conversation with the good answer; the last one ends with it.
        bad: The same with the bad one.
        max_length: Maximum tokens of a sequence.
    """
    if good is None or bad is None:
        return "unpaired; dpo compares two answers to one prompt"
    answers = make_answers(good, bad, max_length)
    if isinstance(answers, str):
        return answers
    chosen, rejected = answers
    if chosen["prompt_ids"] != rejected["prompt_ids"]:
        return "template_changes_turns; the chat template renders the prompt differently before each answer"
    ids = {"chosen_ids": chosen["completion_ids"], "rejected_ids": rejected["completion_ids"]}
    return [{"prompt_ids": chosen["prompt_ids"], **ids}]


def make_answers(
    good: Sequence[Encoded] | Fault | None, bad: Sequence[Encoded] | Fault | None, max_length: int
) -> list[dict[str, Any]] | str:
    """Return a row for each answer, or why there is none; see `make_pair`."""
    rows = []
    for one, label in ((good, True), (bad, False)):
        if isinstance(one, Fault):
            return str(one)
        if one is not None:
            prompt, answer = cut_answer(one[-1])
            if (length := len(prompt) + len(answer)) > max_length:
                return f"over_length; {length} tokens, raise prefer.max_length={max_length}"
            ids = {"prompt_ids": prompt.tolist(), "completion_ids": answer.tolist()}
            rows.append({**ids, "label": label})
    return rows


def cut_answer(encoded: Encoded) -> tuple[Ids, Ids]:
    """Return the tokens before the answer, and those of the answer up to its stop token.

    Example:
        >>> import numpy as np
        >>> ids, labels = np.array([5, 6, 7, 8]), np.array([-100, -100, 7, -100])
        >>> [part.tolist() for part in cut_answer(Encoded(ids, labels))]
        [[5, 6], [7]]
    """
    labelled = (encoded.labels != IGNORED).nonzero()[0]
    first, last = int(labelled[0]), int(labelled[-1]) + 1
    return encoded.input_ids[:first], encoded.input_ids[first:last]


def write_comparisons(path: Path, found: Rows) -> None:
    """Write the rows as an Arrow stream, which `datasets` maps into memory."""
    schema = SCHEMAS[found.method]
    with atomic_write(path) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
        writer.write_table(pa.Table.from_pylist(found.rows, schema=schema))


def other_rows(order: Sequence[int], size: int) -> list[int]:
    """Return the row whose answer follows the prompt of each row of the plan to estimate the KL term.

    It is the row before it in the same forward pass, as in TRL: each answer is used once.

    Args:
        order: Rows in the order of the plan.
        size: Rows per forward pass of a rank.

    Example:
        >>> other_rows([4, 7, 1, 0, 2, 5], size=3)
        [1, 4, 7, 5, 0, 2]
    """
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [row for group in groups for row in (group[-1], *group[:-1])]
