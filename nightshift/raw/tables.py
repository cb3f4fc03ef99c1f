"""Rows of Parquet and Arrow files, and copies of such files without some of their rows."""

import contextlib
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow
from nightshift.raw.streams import Limits, damaged, require_size

Numbered = Iterator[tuple[int, RawRow | RowError]]
Batches = Iterator[pa.RecordBatch]
ROWS_PER_BATCH = 1024
# Start of an Arrow file; without it, the file is a stream, as `datasets` writes it.
ARROW_FILE = b"ARROW1"


def read_table(path: Path, batches: Callable[[Path, Limits], Batches], limits: Limits) -> Numbered:
    """Yield the rows of a table, batch by batch.

    Raises:
        DataError: The file is damaged, or its size is above the limit.
    """
    number = 0
    try:
        for batch in batches(path, limits):
            for row in _batch_rows(batch, limits.row_bytes):
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as err:
        raise damaged(path, err) from err


def parquet_batches(path: Path, limits: Limits) -> Batches:
    """Yield the batches of a Parquet file; its metadata declares its size."""
    with pq.ParquetFile(path) as file:
        meta = file.metadata
        size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        require_size(path, size, limits)
        yield from file.iter_batches(ROWS_PER_BATCH)


def arrow_batches(path: Path, limits: Limits) -> Batches:
    """Yield the batches of an Arrow file or stream; its size is known batch by batch."""
    size = 0
    with pa.OSFile(str(path)) as source:
        for batch in _open_arrow(path, source)[1]:
            size += batch.nbytes
            require_size(path, size, limits)
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.slice(start, ROWS_PER_BATCH)


TABLES: dict[str, Callable[[Path, Limits], Batches]] = {
    "parquet": parquet_batches,
    "arrow": arrow_batches,
    "feather": arrow_batches,
}


def erase_table(path: Path, target: Path, form: str, numbers: Set[int]) -> None:
    """Write a copy of a table with nulls for some of its rows."""
    if form == "parquet":
        with pq.ParquetFile(path) as source:
            schema = _nullable(source.schema_arrow)
            with pq.ParquetWriter(target, schema, compression="zstd") as writer:
                _erase(source.iter_batches(ROWS_PER_BATCH), schema, numbers, writer)
        return
    with pa.OSFile(str(path)) as source:
        schema, batches = _open_arrow(path, source)
        create = pa.ipc.new_file if _is_arrow_file(path) else pa.ipc.new_stream
        with create(str(target), _nullable(schema)) as writer:
            _erase(batches, _nullable(schema), numbers, writer)


def without_padding(value: Any) -> Any:
    """Take out the keys of nested objects that are null.

    A struct of Arrow has the keys of all rows: {"city": "Rome"} becomes {"city": "Rome", "to": null} if
    another row has `to`. A null that an author wrote into a JSON text stays.

    Example:
        >>> without_padding([{"arguments": {"city": "Rome", "to": None}, "text": '{"to": null}'}])
        [{'arguments': {'city': 'Rome'}, 'text': '{"to": null}'}]
    """
    if isinstance(value, dict):
        return {key: without_padding(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_padding(one) for one in value]
    return value


def _open_arrow(path: Path, source: pa.NativeFile) -> tuple[pa.Schema, Batches]:
    """Return the schema and the batches of an Arrow file or stream."""
    if not _is_arrow_file(path):
        stream = pa.ipc.open_stream(source)
        return stream.schema, iter(stream)
    reader = pa.ipc.open_file(source)
    return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))


def _is_arrow_file(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ARROW_FILE)) == ARROW_FILE


def _nullable(schema: pa.Schema) -> pa.Schema:
    """Return a schema whose columns can hold nulls."""
    return pa.schema([field.with_nullable(nullable=True) for field in schema], schema.metadata)


def _erase(batches: Batches, schema: pa.Schema, numbers: Set[int], writer: Any) -> None:
    """Write all batches, with nulls for some of the rows."""
    first = 1
    for batch in batches:
        kept = [None if first + i in numbers else i for i in range(batch.num_rows)]
        writer.write_batch(batch.take(pa.array(kept, pa.int64())).cast(schema))
        first += batch.num_rows


def _batch_rows(batch: pa.RecordBatch, limit: int) -> Iterator[RawRow | RowError]:
    """Yield the rows of a batch; one by one only if the batch is too large or cannot be decoded."""
    if batch.nbytes <= limit:
        with contextlib.suppress(UnicodeDecodeError):
            rows = [_row(row) for row in batch.to_pylist()]
            yield from rows
            return
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        try:
            yield RowError("too_large") if one.nbytes > limit else _row(one.to_pylist()[0])
        except UnicodeDecodeError:
            yield RowError("not_utf8")


def _row(row: RawRow) -> RawRow:
    return {key: without_padding(value) for key, value in row.items()}
