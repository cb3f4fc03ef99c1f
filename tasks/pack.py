"""Tokenise, mask and pack: data/decontaminate and data/base -> data/pack.

TRL's best-fit-decreasing packer sees the whole set at once, which fills rows to within 0.1 % of the
volume bound (batches of 1,000: 0.4 %). For every span, a row records the example, its position in the
shard, and the first token, so that a loss can be traced back to a line of raw data.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from nightshift.core.config import StageParams, load_params
from nightshift.core.errors import DataError
from nightshift.core.files import iterate_batches, write_table
from nightshift.core.paths import BASE, CLEAN_TRAIN, PACKED, RAW
from nightshift.core.stage import run_main, write_summary
from nightshift.data.drops import Drops, Rate, require_drop_rate
from nightshift.data.encode import (
    FAULTS,
    IGNORED,
    Encoded,
    Encoder,
    encode_known,
    load_encoder,
    open_memo,
)
from nightshift.data.weights import COLUMNS, Weights
from nightshift.raw.options import read_weights

TOKENS = pa.list_(pa.int32())
# seq_lengths, example_ids, origins (`source/arrival.suffix:line`) and starts (first token of the span in
# its example, 0 unless it was split) have one entry per span of the row.
ROWS = pa.schema(
    [
        ("input_ids", TOKENS),
        ("labels", TOKENS),
        ("seq_lengths", TOKENS),
        ("example_ids", pa.list_(pa.string())),
        ("origins", pa.list_(pa.string())),
        ("starts", TOKENS),
    ]
)
OverLength = Literal["error", "drop", "truncate", "split"]


class PackParams(StageParams):
    """Row size, and the handling of examples that do not fit.

    Attributes:
        packing: Whether a row holds several spans, or one.
        max_length: Tokens per row, at most.
        over_length: Handling of a longer example: fail, drop, truncate at the end, or split into spans.
        max_lost_token_share: Highest share of lost tokens, 0 to 1.
        max_drop_rate: Highest rate of entirely lost examples, 0 to 1, overall and per source.
    """

    packing: bool
    max_length: Annotated[int, Field(strict=True, ge=8)]
    over_length: OverLength
    max_lost_token_share: Rate
    max_drop_rate: Rate


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of an encoded example, contiguous in one row."""

    example: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded examples, concatenated.

    Attributes:
        input_ids: All tokens, shape (n_tokens,).
        labels: Labels of the tokens, shape (n_tokens,); -100 for tokens without a loss.
        offsets: Index of each example's first token, then the total, shape (n_examples + 1,).
        ids: Id of each example.
        origins: `source/arrival.suffix:line` of each example.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    ids: list[str]
    origins: list[str]


def main() -> None:
    """Encode the examples, cut them into spans, and pack the spans into rows."""
    params = load_params(PackParams, "pack")
    weights = Weights(read_weights(RAW))
    batches = iterate_batches(CLEAN_TRAIN, ["id", "messages", "tools", "origin", *COLUMNS])
    corpus = encode_corpus(weights.apply(batches), load_encoder(BASE))
    spans, dropped, lost = fit(corpus, params.max_length, params.over_length)
    total = len(corpus.input_ids)
    require_fit(lost, total, params)
    drops = count_drops(corpus, dropped)
    require_drop_rate(
        drops,
        params.max_drop_rate,
        (CLEAN_TRAIN, "pack.max_drop_rate"),
        f"raise pack.max_length={params.max_length}, set pack.over_length: split",
    )
    sizes = [span.stop - span.start for span in spans]
    rows = pack(sizes, params.max_length) if params.packing else [[i] for i in range(len(sizes))]
    table = build_rows(corpus, spans, rows)
    write_table(PACKED, table)
    tokens = total - sum(lost.values())
    write_summary(
        "pack",
        rows_in=len(corpus.ids) - weights.added.total() + weights.left_out.total(),
        rows_out=len(corpus.ids) - len(dropped),
        added=weights.added.total(),
        dropped=drops.by_reason() + Counter(weight=weights.left_out.total()),
        dropped_by_source=drops.by_source(),
        copies_by_source=dict(sorted((+weights.added).items())),
        left_out_by_source=dict(sorted((+weights.left_out).items())),
        spans=len(spans),
        packed_rows=len(rows),
        packed_rows_bound=math.ceil(tokens / params.max_length),
        tokens_in=total,
        tokens_out=tokens,
        tokens_dropped={reason: count for reason, count in sorted(lost.items()) if count},
        tokens_supervised=int(
            np.count_nonzero(np.asarray(table["labels"].combine_chunks().values) != IGNORED)
        ),
        efficiency=round(tokens / (len(rows) * params.max_length), 4),
    )


def encode_corpus(batches: Iterable[pa.RecordBatch], encoder: Encoder) -> Corpus:
    """Encode all examples in batches, using the cache of token ids.

    Raises:
        DataError: An example that passed ingest cannot be encoded.
    """
    encoded: list[list[Encoded]] = []
    ids: list[str] = []
    origins: list[str] = []
    with open_memo(encoder) as memo:
        for batch in batches:
            rows = batch.to_pylist()
            done = encode_known([(row["messages"], row["tools"]) for row in rows], encoder, memo)
            encoded.append([_require_encoded(one, row) for one, row in zip(done, rows, strict=True)])
            ids += [row["id"] for row in rows]
            origins += [row["origin"] for row in rows]
    return join([one for batch in encoded for one in batch], ids, origins)


def join(encoded: Sequence[Encoded], ids: list[str], origins: list[str]) -> Corpus:
    """Concatenate encoded examples.

    Raises:
        DataError: There are no examples.
    """
    if not encoded:
        raise DataError(f"{CLEAN_TRAIN}: no examples to pack; see the summaries of the preceding stages")
    lengths = [len(one.input_ids) for one in encoded]
    return Corpus(
        np.concatenate([one.input_ids for one in encoded]),
        np.concatenate([one.labels for one in encoded]),
        np.cumsum([0, *lengths], dtype=np.int64),
        ids,
        origins,
    )


def fit(
    corpus: Corpus, max_length: int, over_length: OverLength
) -> tuple[list[Span], dict[int, str], Counter[str]]:
    """Cut the corpus into spans of at most `max_length` tokens, each with a supervised token.

    The first token of a span has no context to be predicted from, so its label does not count.

    Returns:
        Spans in order; dropped examples with their reasons; number of lost tokens by reason.
    """
    spans: list[Span] = []
    dropped: dict[int, str] = {}
    lost: Counter[str] = Counter()
    supervised = np.concatenate([[0], np.cumsum(corpus.labels != IGNORED)])
    for example, (first, end) in enumerate(pairwise(corpus.offsets.tolist())):
        length = end - first
        kept = 0
        for start, stop in cut(length, max_length, over_length):
            if supervised[first + stop] > supervised[first + start + 1]:
                spans.append(Span(example, start, stop))
                kept += stop - start
            else:
                lost["no_supervised_token"] += stop - start
                length -= stop - start
        lost["over_length"] += length - kept
        if not kept:
            dropped[example] = "over_length" if length else "no_supervised_token"
    return spans, dropped, lost


def count_drops(corpus: Corpus, dropped: Mapping[int, str]) -> Drops:
    """Count all and dropped examples by source, the first part of the origin."""
    drops = Drops(Counter(origin.split("/", 1)[0] for origin in corpus.origins))
    for i, reason in dropped.items():
        origin, tokens = corpus.origins[i], corpus.offsets[i + 1] - corpus.offsets[i]
        drops.add(origin.split("/", 1)[0], reason, f"{origin}: {reason}; {tokens} tokens")
    return drops


def cut(length: int, max_length: int, over_length: OverLength) -> list[tuple[int, int]]:
    """Return the (start, stop) token ranges of an example to keep as spans.

    Example:
        >>> cut(5, 4, "drop"), cut(5, 4, "truncate"), cut(5, 4, "split"), cut(4, 4, "drop")
        ([], [(0, 4)], [(0, 4), (4, 5)], [(0, 4)])
    """
    if length <= max_length:
        return [(0, length)]
    match over_length:
        case "truncate":
            return [(0, max_length)]
        case "split":
            return [(start, min(start + max_length, length)) for start in range(0, length, max_length)]
        case _:
            return []


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Assign spans to rows with TRL's best-fit-decreasing packer.

    The packer moves a column with the span number of each token, from which the token positions
    follow, at a third of the memory.

    Args:
        lengths: Tokens per span, shape (n_spans,), each 1 to `max_length`.
        max_length: Row capacity, in tokens.

    Returns:
        Span numbers of each row, in row order; every span is in exactly one row, unsplit.

    Example:
        >>> pack([5, 2, 3, 1], max_length=6)
        [[0, 3], [2, 1]]
    """
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # noqa: PTH123 - a device
        from datasets import Dataset
        from trl.data_utils import pack_dataset

        numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        column = pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), numbers)
        packed = pack_dataset(
            Dataset(pa.table({"span": column})),
            seq_length=max_length,
            strategy="bfd",
            map_kwargs={"batch_size": len(lengths), "load_from_cache_file": False},
        )
    return list(_spans_of_rows(packed.data.table))


def build_rows(corpus: Corpus, spans: Sequence[Span], rows: Sequence[Sequence[int]]) -> pa.Table:
    """Build the table of packed rows.

    Returns:
        A table with the columns of `ROWS`. The first label of each span is -100.
    """
    order = [spans[number] for row in rows for number in row]
    lengths = np.array([span.stop - span.start for span in order], dtype=np.int64)
    starts = np.array([span.start for span in order], dtype=np.int64)
    examples = np.array([span.example for span in order], dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    source = np.repeat(corpus.offsets[examples] + starts - begins, lengths) + np.arange(lengths.sum())
    labels = corpus.labels[source]
    labels[begins] = IGNORED
    spans_of_row = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    tokens_of_row = np.append(begins, lengths.sum())[spans_of_row].astype(np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(tokens_of_row, corpus.input_ids[source]),
        "labels": pa.ListArray.from_arrays(tokens_of_row, labels),
        "seq_lengths": pa.ListArray.from_arrays(spans_of_row, lengths.astype(np.int32)),
        "example_ids": pa.ListArray.from_arrays(spans_of_row, pa.array(corpus.ids).take(examples)),
        "origins": pa.ListArray.from_arrays(spans_of_row, pa.array(corpus.origins).take(examples)),
        "starts": pa.ListArray.from_arrays(spans_of_row, starts.astype(np.int32)),
    }
    return pa.table(columns, schema=ROWS)


def require_fit(lost: Counter[str], total: int, params: PackParams) -> None:
    """Fail if examples that do not fit lose more tokens than allowed.

    Raises:
        DataError: An example is too long for the policy `error`, or too many (or all) tokens are lost.
    """
    if params.over_length == "error" and lost["over_length"]:
        raise DataError(
            f"{CLEAN_TRAIN}: {lost['over_length']} of {total} tokens are in examples longer than "
            f"pack.max_length={params.max_length}; raise it, or set pack.over_length"
        )
    if lost.total() == total or lost.total() > params.max_lost_token_share * total:
        raise DataError(
            f"{CLEAN_TRAIN}: {lost.total()} of {total} tokens would be lost ({dict(lost)}), more than "
            f"pack.max_lost_token_share={params.max_lost_token_share}; raise pack.max_length="
            f"{params.max_length}, set pack.over_length: split, or raise the share"
        )


def _spans_of_rows(packed: pa.Table) -> Iterator[list[int]]:
    """Yield the span numbers of each packed row, in order."""
    for chunk in packed["span"].chunks:
        offsets = chunk.offsets.to_numpy()
        numbers = chunk.values.to_numpy()
        for begin, end in pairwise(offsets.tolist()):
            row = numbers[begin:end]
            yield row[np.flatnonzero(np.diff(row, prepend=-1))].tolist()


def _require_encoded(one: Encoded | str, row: dict[str, Any]) -> Encoded:
    """Return the encoded example.

    Raises:
        DataError: The example could not be encoded.
    """
    if isinstance(one, str):
        raise DataError(f"{CLEAN_TRAIN}: example {row['id']} ({row['origin']}): {one}; {FAULTS[one]}")
    return one


if __name__ == "__main__":
    run_main(main)
