"""Tokenise, mask and pack: data/decontaminate and data/base -> data/pack.

TRL's best-fit-decreasing packer decides over the whole set at once, which fills rows to within 0.1 %
of the volume bound (batches of 1,000: 0.4 %). Each row keeps, for every span in it, the example, the
place in its shard, and the first token, so that a loss can be traced back to a line of raw data.
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
from nightshift.core.paths import BASE, CLEAN_TRAIN, PACKED
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

TOKENS = pa.list_(pa.int32())
# seq_lengths, example_ids, origins (`source/arrival.suffix:line`) and starts (first token of the span in
# its example, 0 unless it was split) have one entry for each span of the row.
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
    """Size of a row and what to do with an example that does not fit.

    Attributes:
        packing: Several spans in a row, or one.
        max_length: Tokens in a row.
        over_length: For a longer example: fail, drop it, cut its end off, or split it into spans.
        max_lost_token_share: Share of all tokens, 0 to 1, that may be lost.
        max_drop_rate: Rate of examples, 0 to 1, among all and in each source, that may be lost as a whole.
    """

    packing: bool
    max_length: Annotated[int, Field(strict=True, ge=8)]
    over_length: OverLength
    max_lost_token_share: Rate
    max_drop_rate: Rate


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start to stop (exclusive) of one encoded example, which stand together in a row."""

    example: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded examples, end to end.

    Attributes:
        input_ids: All tokens, shape (n_tokens,).
        labels: Their labels, shape (n_tokens,); -100 for none.
        offsets: First token of each example and the end, shape (n_examples + 1,).
        ids: Id of each example.
        origins: `source/arrival.suffix:line` of each example.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    ids: list[str]
    origins: list[str]


def main() -> None:
    """Encode every example, fit it into spans, pack the spans."""
    params = load_params(PackParams, "pack")
    corpus = encode_corpus(
        iterate_batches(CLEAN_TRAIN, ["id", "messages", "tools", "origin"]), load_encoder(BASE)
    )
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
        rows_in=len(corpus.ids),
        rows_out=len(corpus.ids) - len(dropped),
        dropped=drops.by_reason(),
        dropped_by_source=drops.by_source(),
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
    """Encode all examples, batch by batch, through the memo of token ids.

    Raises:
        DataError: An example cannot be encoded, although ingest let it through.
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
    """Lay encoded examples end to end.

    Raises:
        DataError: There is none.
    """
    if not encoded:
        raise DataError(f"{CLEAN_TRAIN}: no examples to pack; see the summaries of the stages before")
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
    """Cut the corpus into spans of at most `max_length` tokens, each with a label to learn from.

    Nothing precedes the first token of a span that could predict it, so a label there does not count.

    Returns:
        The spans in order; the examples that are left out, each with its reason; the tokens lost, by reason.
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
    """Count the examples and those that are left out, by source, the first part of an origin."""
    drops = Drops(Counter(origin.split("/", 1)[0] for origin in corpus.origins))
    for i, reason in dropped.items():
        origin, tokens = corpus.origins[i], corpus.offsets[i + 1] - corpus.offsets[i]
        drops.add(origin.split("/", 1)[0], reason, f"{origin}: {reason}; {tokens} tokens")
    return drops


def cut(length: int, max_length: int, over_length: OverLength) -> list[tuple[int, int]]:
    """Say which tokens of an example are kept together.

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

    The packer moves a column in which each token holds the number of its span; where the tokens
    themselves go follows from it, at a third of the memory.

    Args:
        lengths: Tokens of each span, shape (n_spans,), each 1 to `max_length`.
        max_length: Row capacity, in tokens.

    Returns:
        Span numbers of each row, in the order of the row; every span stands in one row, whole.

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
    """Gather the packed rows.

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
    """Fail when examples that do not fit cost more than allowed.

    Raises:
        DataError: An example is too long and the policy is `error`, too many tokens would be lost, or all.
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
    """Return the tokens.

    Raises:
        DataError: The example has a fault.
    """
    if isinstance(one, str):
        raise DataError(f"{CLEAN_TRAIN}: example {row['id']} ({row['origin']}): {one}; {FAULTS[one]}")
    return one


if __name__ == "__main__":
    run_main(main)
