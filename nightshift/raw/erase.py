"""Erase rows from a shard; all other rows keep their bytes and their numbers."""

import csv
import io
import logging
import sys
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.core.files import atomic_write, file_digest, text_digest, write_json
from nightshift.raw.arrays import split_array
from nightshift.raw.checks import repair
from nightshift.raw.convert import convert
from nightshift.raw.faults import RowError
from nightshift.raw.forgotten import Forgotten, read_forgotten, write_forgotten
from nightshift.raw.formats import shard_suffix, split_suffix
from nightshift.raw.readers import ROWS_PER_BATCH, CsvLines, read_shard
from nightshift.raw.shards import DIGESTS, read_digests
from nightshift.raw.streams import Limits, damaged, open_bytes, skip_bom
from nightshift.raw.strict_json import dumps
from nightshift.raw.turns import Conversation

log = logging.getLogger(__name__)
# The shard was accepted before; no row may be left out.
NO_LIMITS = Limits(sys.maxsize - 1, sys.maxsize, sys.maxsize)


def erase_known(shard: Path, raw: Path) -> None:
    """Erase previously forgotten rows from a new shard, and record the original digest of the shard."""
    forgotten = read_forgotten(raw)
    if not forgotten.contents:
        return
    found = conversations(shard)
    numbers = {number for number, row in found if content_digest(row) in forgotten.contents}
    if numbers:
        log.warning(
            "%s: %d previously forgotten rows arrived again and are erased; remove them from the source",
            shard,
            len(numbers),
        )
        forget_rows(shard, numbers, raw, forgotten)


def forget_rows(shard: Path, numbers: Set[int], raw: Path, forgotten: Forgotten) -> None:
    """Erase rows from a shard; `forgotten`, which has their digests, is written first."""
    name, digests = shard.relative_to(raw).as_posix(), read_digests(raw)
    forgotten.rows.update(f"{name}:{number}" for number in numbers)
    forgotten.shards[name] = sorted({*forgotten.shards.get(name, ()), file_digest(shard)})
    write_forgotten(raw, forgotten)
    erase_rows(shard, numbers)
    digests[name] = file_digest(shard)
    write_json(raw / DIGESTS, digests)


def conversations(shard: Path) -> Iterator[tuple[int, Conversation]]:
    """Yield (number, conversation) for the rows of a shard that can be converted to a conversation."""
    for number, row in read_shard(shard, NO_LIMITS):
        if not isinstance(row, RowError):
            with suppress(RowError, RecursionError):
                yield number, repair(convert(row))[0]


def content_digest(conversation: Conversation) -> str:
    """Return the digest of a conversation's content, whatever its origin: BLAKE2b, 32 bytes in hex."""
    contents = [
        [turn.role, turn.content, turn.name, [[call.name, call.arguments] for call in turn.calls]]
        for turn in conversation.turns
    ]
    return text_digest(dumps(contents), dumps(conversation.tools), size=32)


def erase_rows(path: Path, numbers: Set[int]) -> None:
    """Rewrite a shard without some of its rows.

    Erased rows leave placeholders that keep the numbering: blank lines, `null` in a JSON array, a row of
    nulls in Parquet.

    Args:
        path: Path of the shard.
        numbers: Row numbers as in `nightshift.raw.readers.read_shard`.

    Raises:
        DataError: The shard is damaged.
    """
    form, codec = split_suffix(shard_suffix(path.name) or "")
    with atomic_write(path) as temporary:
        if form == "parquet":
            erase_parquet(path, temporary, numbers)
            return
        with (
            open_bytes(path, codec, NO_LIMITS) as source,
            pa.output_stream(str(temporary), compression=codec) as target,
        ):
            skip_bom(source)
            for chunk in without_rows(path, form, source, numbers):
                target.write(chunk)


def without_rows(path: Path, form: str, source: io.BufferedReader, numbers: Set[int]) -> Iterator[bytes]:
    """Yield the bytes of a text shard without the rows."""
    if form == "json" and source.peek(1).lstrip().startswith(b"["):
        yield b"["
        try:
            for number, element in enumerate(split_array(source, NO_LIMITS.row_bytes), start=1):
                yield b",\n" if number > 1 else b""
                yield b"null" if number in numbers else element or b""
        except ValueError as err:
            raise damaged(path, err) from err
        yield b"]\n"
        return
    lines = csv_lines(path, numbers) if form == "csv" else numbers
    for number, line in enumerate(source, start=1):
        yield b"\n" if number in lines else line


def csv_lines(path: Path, numbers: Set[int]) -> set[int]:
    """Return the numbers of all lines of some CSV rows; a row's own number is that of its last line."""
    csv.field_size_limit(NO_LIMITS.row_bytes)
    found: set[int] = set()
    with open_bytes(path, split_suffix(shard_suffix(path.name) or "")[1], NO_LIMITS) as source:
        skip_bom(source)
        lines = CsvLines(source, NO_LIMITS.row_bytes)
        rows = csv.reader(lines, strict=True)
        before = 0
        while True:
            try:
                if next(rows, None) is None:
                    return found
            except csv.Error:
                # A malformed row spans lines too.
                pass
            if lines.number in numbers:
                found.update(range(before + 1, lines.number + 1))
            before = lines.number


def erase_parquet(path: Path, target: Path, numbers: Set[int]) -> None:
    """Write a copy of a Parquet file with nulls for some of its rows."""
    with pq.ParquetFile(path) as source:
        # Non-nullable columns cannot hold nulls.
        schema = pa.schema([field.with_nullable(nullable=True) for field in source.schema_arrow])
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            first = 1
            for batch in source.iter_batches(ROWS_PER_BATCH):
                kept = [None if first + i in numbers else i for i in range(batch.num_rows)]
                writer.write_batch(batch.take(pa.array(kept, pa.int64())).cast(schema))
                first += batch.num_rows
