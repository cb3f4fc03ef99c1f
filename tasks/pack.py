"""Tokenise, mask and pack: data/decontaminate and data/base -> data/pack.

Tokens come from the base's own chat template; only the assistant's turns, each with its stop token,
carry a label. TRL's best-fit-decreasing packer runs over the whole set at once, which fills rows
better than batch by batch. Each row keeps the lengths and the ids of the examples in it.
"""

import contextlib
import os
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from tasks.config import StageParams, load_params
from tasks.errors import DataError
from tasks.files import read_rows, write_rows
from tasks.stage import DATA, run_main, write_summary

BASE = DATA / "base" / "model"
SOURCE = DATA / "decontaminate" / "train.parquet"
TARGET = DATA / "pack" / "train.parquet"
TOKENS = pa.list_(pa.int32())
ROWS = pa.schema(
    [
        ("input_ids", TOKENS),
        ("labels", TOKENS),
        ("seq_lengths", TOKENS),
        ("example_ids", pa.list_(pa.string())),
    ]
)
IGNORED = -100
Encoded = dict[str, list[int]]


class PackParams(StageParams):
    """Size of a row and what to do with an example that does not fit.

    Attributes:
        max_length: Tokens in a row.
        over_length: drop the example, or fail.
        max_lost_token_share: Share of all tokens, 0 to 1, that may be dropped.
    """

    max_length: Annotated[int, Field(strict=True, ge=8)]
    over_length: Literal["drop", "error"]
    max_lost_token_share: Annotated[float, Field(ge=0, le=1)]


def main() -> None:
    """Encode every example, drop what does not fit, pack the rest."""
    params = load_params(PackParams, "pack")
    examples = read_rows(SOURCE)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    encoded = [encode(example["messages"], tokenizer) for example in examples]
    fits = [len(one["input_ids"]) <= params.max_length for one in encoded]
    lost = sum(len(one["input_ids"]) for one, ok in zip(encoded, fits, strict=True) if not ok)
    total = sum(len(one["input_ids"]) for one in encoded)
    require_fit(lost, total, params)
    kept = [i for i, ok in enumerate(fits) if ok]
    rows = pack([encoded[i] for i in kept], [examples[i]["id"] for i in kept], params.max_length)
    write_rows(TARGET, rows, ROWS)
    write_summary(
        "pack",
        rows_in=len(examples),
        rows_out=len(kept),
        dropped={"over_length": len(examples) - len(kept)},
        packed_rows=len(rows),
        tokens_in=total,
        tokens_out=total - lost,
        tokens_dropped={"over_length": lost} if lost else {},
        tokens_supervised=sum(count_supervised(row["labels"]) for row in rows),
        efficiency=round((total - lost) / (len(rows) * params.max_length), 4),
    )


def encode(messages: Sequence[dict[str, str]], tokenizer: Any) -> Encoded:
    """Tokenise a conversation and label its assistant turns, each with its stop token.

    Args:
        messages: The conversation; ends with an assistant turn.
        tokenizer: A fast tokenizer with a chat template.

    Returns:
        input_ids and labels of equal length; labels are -100 outside the assistant's turns.

    Raises:
        DataError: The template does not render turn by turn, so the mask would be a guess.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = [
        span(messages, turn, text, tokenizer)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= begin and end <= stop for start, stop in spans) else IGNORED
        for token, (begin, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    if not count_supervised(labels):
        raise DataError(f"{SOURCE}: no token of an answer carries a label: {messages!r}; report it")
    return {"input_ids": tokens["input_ids"], "labels": labels}


def span(
    messages: Sequence[dict[str, str]],
    turn: int,
    text: str,
    tokenizer: Any,
) -> tuple[int, int]:
    """Locate an assistant turn in the rendered text: its content and the stop token after it.

    Returns:
        First and last + 1 character.

    Raises:
        DataError: The rendered beginning of the conversation is no prefix of the whole.
    """
    before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    if not (text.startswith(after) and after.startswith(before)):
        raise DataError(
            "data/base: the chat template does not render turn by turn, so the answers cannot be "
            "located; use a template that adds each turn at the end"
        )
    # What follows the stop token (a line break in ChatML) is not the model's to say.
    return len(before), len(after.rstrip())


def pack(encoded: Sequence[Encoded], ids: Sequence[str], max_length: int) -> list[dict[str, Any]]:
    """Pack examples into rows with TRL's best-fit-decreasing packer.

    Args:
        encoded: Examples, each at most `max_length` tokens.
        ids: Their ids, for the provenance of each packed span.
        max_length: Row capacity, in tokens.

    Returns:
        Rows with input_ids, labels, seq_lengths and example_ids; every example stands in one row,
        whole. The first label of each example is -100: nothing precedes it that could predict it.
    """
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # noqa: PTH123 - a device
        from datasets import Dataset
        from trl.data_utils import pack_dataset

        columns = {
            "input_ids": [one["input_ids"] for one in encoded],
            "labels": [[IGNORED, *one["labels"][1:]] for one in encoded],
            # The packer keeps list columns aligned, so the example's number travels with each token.
            "example": [[i] * len(one["input_ids"]) for i, one in enumerate(encoded)],
        }
        packed = pack_dataset(
            Dataset.from_dict(columns),
            seq_length=max_length,
            strategy="bfd",
            map_kwargs={"batch_size": len(encoded), "load_from_cache_file": False},
        )
    return [_row(row, ids) for row in packed.to_list()]


def _row(row: dict[str, list[int]], ids: Sequence[str]) -> dict[str, Any]:
    """Replace the example's number at each token by one id for each packed sequence."""
    starts = accumulate(chain([0], row["seq_lengths"][:-1]))
    return {
        "input_ids": row["input_ids"],
        "labels": row["labels"],
        "seq_lengths": row["seq_lengths"],
        "example_ids": [ids[row["example"][start]] for start in starts],
    }


def count_supervised(labels: Sequence[int]) -> int:
    """Count the tokens that carry a label.

    Example:
        >>> count_supervised([-100, 5, 6])
        2
    """
    return sum(label != IGNORED for label in labels)


def require_fit(lost: int, total: int, params: PackParams) -> None:
    """Fail when over-length examples cost more than allowed.

    Raises:
        DataError: There is nothing to pack, or too many tokens would be lost.
    """
    if not total:
        raise DataError(f"{SOURCE}: no examples to pack; see the summaries of the stages before")
    if lost and (params.over_length == "error" or lost > params.max_lost_token_share * total):
        raise DataError(
            f"{SOURCE}: {lost} of {total} tokens are in examples longer than pack.max_length="
            f"{params.max_length}; raise it, or set pack.over_length and pack.max_lost_token_share"
        )


if __name__ == "__main__":
    run_main(main)
