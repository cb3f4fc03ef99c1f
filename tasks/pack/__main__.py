"""Run the stage: cut the examples into spans, pack the spans, write the rows in batches."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.core.config import load_params
from nightshift.core.errors import DataError
from nightshift.core.files import iterate_rows, named_errors, write_batches
from nightshift.core.paths import BASE, CLEAN_TRAIN, PACKED, RAW, START_ROWS
from nightshift.core.stage import run_main, write_summary
from nightshift.data.drops import Drops, require_drop_rate
from nightshift.data.encode import Encoded, load_encoder
from nightshift.data.faults import FAULTS
from nightshift.data.replay import Replay
from nightshift.data.tokens import encode_stream, open_memo
from nightshift.data.weights import COLUMNS, Row, Weights
from nightshift.raw.options import read_weights
from nightshift.registry.start import read_start
from tasks.pack import ROWS, PackParams
from tasks.pack.packer import start_packer
from tasks.pack.spans import SpanFile, cut, fit

# Rows are written in batches of this many tokens.
TOKENS_PER_BATCH = 2**22
# Suggested row lengths are multiples of this.
ROUNDED_TO = 64


@dataclass(slots=True)
class Tally:
    """Counts over all examples.

    Attributes:
        drops: Examples read, and lost entirely.
        lengths: Tokens of each sequence: of an example, or of each of its answers.
        lost: Lost tokens, by reason.
        lost_if_split: Tokens that `over_length: split` would lose.
        supervised: Supervised tokens of the spans.
    """

    drops: Drops = field(default_factory=Drops)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    lost: Counter[str] = field(default_factory=Counter)
    lost_if_split: int = 0
    supervised: int = 0


def main() -> None:
    """Encode the examples, cut them into spans, and pack the spans into rows."""
    params = load_params(PackParams, "pack")
    tally, weights, replay = Tally(), Weights(read_weights(RAW)), find_replay(params)
    with (
        start_packer() if params.packing else nullcontext(one_per_row) as pack,
        named_errors(PACKED),
        SpanFile.create(PACKED.parent) as spans,
    ):
        for number, row, encoded in encode_examples(weights, replay):
            add(number, row, encoded, spans, params, tally)
        if replay.left_out and not tally.lengths:
            raise DataError(
                f"{CLEAN_TRAIN}: no example is new, and pack.replay_share={params.replay_share} chooses none "
                "of the others; raise it"
            )
        require_fit(tally, params)
        require_drop_rate(
            tally.drops,
            params.max_drop_rate,
            (CLEAN_TRAIN, "pack.max_drop_rate"),
            suggest(tally, params),
        )
        rows = pack(spans.lengths, params.max_length)
        write_batches(
            PACKED, build_batches(spans, rows, pq.read_table(CLEAN_TRAIN, columns=["id", "origin"])), ROWS
        )
    tokens = sum(spans.lengths)
    write_summary(
        "pack",
        rows_in=tally.drops.read.total()
        - weights.added.total()
        + weights.left_out.total()
        + replay.left_out.total(),
        rows_out=tally.drops.read.total() - tally.drops.by_reason().total(),
        added=weights.added.total(),
        dropped=tally.drops.by_reason()
        + Counter(weight=weights.left_out.total(), replay=replay.left_out.total()),
        dropped_by_source=tally.drops.by_source(),
        copies_by_source=dict(sorted((+weights.added).items())),
        left_out_by_source=dict(sorted((+weights.left_out).items())),
        replayed_by_source=dict(sorted(replay.replayed.items())),
        spans=len(spans.lengths),
        packed_rows=len(rows),
        packed_rows_bound=math.ceil(tokens / params.max_length),
        tokens_in=sum(tally.lengths),
        tokens_out=tokens,
        tokens_dropped=dict(sorted(tally.lost.items())),
        tokens_supervised=tally.supervised,
        efficiency=round(tokens / (len(rows) * params.max_length), 4),
    )


def one_per_row(lengths: Sequence[int], max_length: int) -> list[list[int]]:  # noqa: ARG001 - like `pack`
    """Give each span its own row."""
    return [[number] for number in range(len(lengths))]


def find_replay(params: PackParams) -> Replay:
    """Return which examples are trained again, if training starts from a version that was trained on them."""
    if params.replay_share is None or read_start().version is None:
        return Replay()
    trained = {row["id"] for row in iterate_rows(START_ROWS, ["id"])}
    return Replay(params.replay_share, params.seed, trained)


def encode_examples(weights: Weights, replay: Replay) -> Iterator[tuple[int, Row, list[Encoded]]]:
    """Yield the row number of each example, the example (without id) and its sequences of tokens.

    Raises:
        DataError: An example that passed ingest cannot be encoded.
    """
    encoder = load_encoder(BASE)
    columns = ["id", "parent_id", "messages", "tools", "origin", *COLUMNS]
    examples = weights.repeat(replay.draw(enumerate(iterate_rows(CLEAN_TRAIN, columns))))
    items = (((number, row), (row["messages"], row["tools"])) for number, row in examples)
    with open_memo(encoder) as memo:
        for (number, row), encoded in encode_stream(items, encoder, memo):
            if not isinstance(encoded, list):
                raise DataError(f"{CLEAN_TRAIN}: {row['origin']}: {encoded}")
            yield number, row, encoded


def add(
    number: int, row: Row, sequences: Sequence[Encoded], spans: SpanFile, params: PackParams, tally: Tally
) -> None:
    """Cut the sequences of one example into spans, store them with its row number, and count them."""
    lost, stored = Counter[str](), len(spans.lengths)
    for encoded in sequences:
        length = len(encoded.input_ids)
        kept, too_much = fit(encoded, params.max_length, params.over_length)
        tally.supervised += sum(spans.append(number, span, encoded) for span in kept)
        tally.lengths.append(length)
        if too_much:
            lost += too_much
        if length > params.max_length:
            whole = cut(length, encoded.rounds.tolist(), params.max_length, "split")
            tally.lost_if_split += length - sum(span.stop - span.start for span in whole)
    tally.lost += lost
    origin = row["origin"]
    source = origin.split("/", 1)[0]
    tally.drops.read[source] += 1
    if len(spans.lengths) == stored:
        reason = "over_length" if lost["over_length"] else "no_supervised_token"
        tokens = sum(len(encoded.input_ids) for encoded in sequences)
        tally.drops.add(source, reason, f"{origin}: {reason}; {tokens} tokens")


def require_fit(tally: Tally, params: PackParams) -> None:
    """Fail if examples that do not fit lose more tokens than allowed.

    Raises:
        DataError: There are no examples, an example is too long for the policy `error`, or too many (or all)
            tokens are lost.
    """
    total, lost = sum(tally.lengths), tally.lost.total()
    if not total:
        raise DataError(f"{CLEAN_TRAIN}: no examples to pack; see the summaries of the preceding stages")
    if params.over_length == "error" and tally.lost["over_length"]:
        raise DataError(
            f"{CLEAN_TRAIN}: {tally.lost['over_length']} of {total} tokens are in examples longer than "
            f"pack.max_length={params.max_length}; {suggest(tally, params)}"
        )
    if lost == total or lost > params.max_lost_token_share * total:
        raise DataError(
            f"{CLEAN_TRAIN}: {lost} of {total} tokens would be lost ({dict(tally.lost)}), more than "
            f"pack.max_lost_token_share={params.max_lost_token_share}; {suggest(tally, params)}, or raise "
            "the share"
        )


def suggest(tally: Tally, params: PackParams) -> str:
    """Return what to do about long examples: values of pack.max_length, and splitting if that is enough.

    The smaller value keeps 99 % of the examples, or as many as pack.max_lost_token_share requires.
    """
    lengths = np.sort(np.asarray(tally.lengths))
    if lengths[-1] <= params.max_length:
        return FAULTS["no_supervised_token"]
    allowed = params.max_lost_token_share * lengths.sum()
    enough = int(np.argmax(lengths.sum() - np.cumsum(lengths) <= allowed))
    p99 = round((len(lengths) - 1) * 0.99)
    found = {lengths[-1]} if params.over_length == "error" else {lengths[max(p99, enough)], lengths[-1]}
    values = [
        f"{size} (keeps {np.mean(lengths <= size):.1%} of the examples)"
        for size in sorted(set(map(round_up, found)))
        if size > params.max_length
    ]
    text = f"p99 is {lengths[p99]} tokens, the longest example {lengths[-1]}"
    text += f": set pack.max_length={params.max_length} to {' or '.join(values)}"
    if params.over_length != "split" and tally.lost_if_split <= allowed:
        text += f", or set pack.over_length: split (loses {tally.lost_if_split} tokens)"
    return text


def round_up(length: int) -> int:
    """Round up to the next suggested row length.

    Example:
        >>> round_up(561), round_up(576)
        (576, 576)
    """
    return -(-length // ROUNDED_TO) * ROUNDED_TO


def build_batches(
    spans: SpanFile, rows: Sequence[Sequence[int]], examples: pa.Table
) -> Iterator[pa.RecordBatch]:
    """Yield the packed rows in batches.

    Args:
        spans: Spans, with their tokens.
        rows: Span numbers of each row.
        examples: id and origin of each example.

    Yields:
        Batches with the columns of `ROWS`. The first label of each span is -100.
    """
    lengths, offsets = np.asarray(spans.lengths), spans.offsets()
    numbers, starts = np.asarray(spans.examples), np.asarray(spans.starts)
    remaining = iter(rows)
    longest = max((int(lengths[row].sum()) for row in rows), default=1)
    while batch := list(islice(remaining, max(1, TOKENS_PER_BATCH // longest))):
        order = np.concatenate(batch)
        ids, labels = spans.read(offsets[order].tolist(), lengths[order].tolist())
        spans_of_row = np.cumsum([0, *map(len, batch)], dtype=np.int32)
        tokens_of_row = np.cumsum([0, *lengths[order]], dtype=np.int32)[spans_of_row]
        names = examples.take(numbers[order]).combine_chunks()
        columns = {
            "input_ids": (tokens_of_row, ids),
            "labels": (tokens_of_row, labels),
            "seq_lengths": (spans_of_row, lengths[order].astype(np.int32)),
            "example_ids": (spans_of_row, names["id"].chunk(0)),
            "origins": (spans_of_row, names["origin"].chunk(0)),
            "starts": (spans_of_row, starts[order].astype(np.int32)),
        }
        arrays = [pa.ListArray.from_arrays(*columns[name]) for name in ROWS.names]
        yield pa.RecordBatch.from_arrays(arrays, schema=ROWS)


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
