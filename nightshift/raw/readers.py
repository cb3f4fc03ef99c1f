"""Numbered rows of a shard, one at a time: JSON Lines, JSON array, CSV, Parquet.

An unreadable row is yielded as a `RowError`. If the rest of a shard cannot be read, the stage fails.
"""

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.raw.arrays import split_array
from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow, shard_suffix, split_suffix
from nightshift.raw.streams import Limits, damaged, open_bytes, read_line, require_size, skip_bom
from nightshift.raw.strict_json import loads

Numbered = Iterator[tuple[int, RawRow | RowError]]
ROWS_PER_BATCH = 1024
ESCAPE = re.compile(r"\\u[dD]")
SURROGATE = re.compile("[\ud800-\udfff]")


def read_shard(path: Path, limits: Limits) -> Numbered:
    """Yield (number, row or error) for every row of a shard.

    Numbers start at 1: lines of JSON Lines and CSV, elements of a JSON array, rows of Parquet.

    Raises:
        DataError: The shard is damaged, or exceeds the limits.
    """
    if not path.stat().st_size:
        yield 1, RowError("empty_file")
        return
    form, codec = split_suffix(shard_suffix(path.name) or "")
    if form == "parquet":
        yield from read_parquet(path, limits)
        return
    with open_bytes(path, codec, limits) as file:
        skip_bom(file)
        if form == "csv":
            yield from read_csv(path, file, limits.row_bytes)
        elif form == "json" and file.peek(1).lstrip().startswith(b"["):
            yield from read_array(path, file, limits.row_bytes)
        else:
            yield from read_json_lines(file, limits.row_bytes)


def read_json_lines(file: io.BufferedReader, limit: int) -> Numbered:
    """Yield the objects of JSON Lines; skip blank lines."""
    number = 0
    while (line := read_line(file, limit)) != b"":
        number += 1
        if line is None or line.strip():
            yield number, parse_json(line)


def parse_json(line: bytes | None) -> RawRow | RowError:
    r"""Parse one JSON object; None is a line above the size limit.

    Example:
        >>> parse_json(b'{"text": "a"}'), parse_json(b"\xff").reason, parse_json(b"[1]").reason
        ({'text': 'a'}, 'not_utf8', 'not_an_object')
    """
    if line is None:
        return RowError("too_large")
    try:
        text = line.decode("utf-8")
        row = loads(text)
    except UnicodeDecodeError:
        return RowError("not_utf8")
    except RecursionError:
        return RowError("too_deep")
    except ValueError as err:
        place = f"column {err.colno}" if isinstance(err, json.JSONDecodeError) else ""
        return RowError("malformed_json", place)
    if not isinstance(row, dict):
        return RowError("not_an_object")
    # In valid UTF-8, only an escape can produce a lone surrogate.
    if ESCAPE.search(text) and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return RowError("lone_surrogate")
    return row


def read_array(path: Path, file: io.BufferedReader, limit: int) -> Numbered:
    """Yield the elements of a JSON array.

    Raises:
        DataError: The array is not closed, or data follows it.
    """
    try:
        for number, element in enumerate(split_array(file, limit), start=1):
            yield number, parse_json(element)
    except ValueError as err:
        raise damaged(path, err) from err


class CsvLines:
    """Lines of a CSV file as text. Invalid UTF-8 becomes surrogates: a bad row does not end the file."""

    def __init__(self, file: io.BufferedReader, limit: int) -> None:
        self._file, self._limit, self.number = file, limit, 0

    def __iter__(self) -> Iterator[str]:
        """Return the iterator."""
        return self

    def __next__(self) -> str:
        """Read one line.

        Raises:
            csv.Error: The line is too long; the next call continues after it.
        """
        line = read_line(self._file, self._limit)
        if line == b"":
            raise StopIteration
        self.number += 1
        if line is None:
            raise csv.Error("line larger than field limit")
        return line.decode("utf-8", "surrogateescape")


def read_csv(path: Path, file: io.BufferedReader, limit: int) -> Numbered:
    """Yield the rows of a CSV file with a header; a row's number is that of its last line.

    Raises:
        DataError: The header has no or duplicate column names, or a quote is never closed.
    """
    csv.field_size_limit(limit)
    lines = CsvLines(file, limit)
    rows = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = next(rows, None)
        except csv.Error as err:
            if header is None or "unexpected end" in str(err):
                raise damaged(path, f"line {lines.number}: {err}") from err
            yield lines.number, RowError("too_large" if "field limit" in str(err) else "malformed_csv")
            continue
        if fields is None:
            return
        if header is None:
            header = fields
            if not any(header) or len(set(header)) < len(header):
                raise damaged(path, "line 1: the header has no column names or a duplicate")
        elif fields:
            yield lines.number, _csv_row(header, fields)


def read_parquet(path: Path, limits: Limits) -> Numbered:
    """Yield the rows of a Parquet file, batch by batch.

    Raises:
        DataError: The file is damaged, or its metadata reports a size above the limit.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            require_size(path, size, limits)
            for batch in file.iter_batches(ROWS_PER_BATCH):
                for row in _batch_rows(batch, limits.row_bytes):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as err:
        raise damaged(path, err) from err


def _batch_rows(batch: pa.RecordBatch, limit: int) -> Iterator[RawRow | RowError]:
    """Yield the rows of a batch; one by one only if the batch is too large or cannot be decoded."""
    if batch.nbytes <= limit:
        with contextlib.suppress(UnicodeDecodeError):
            rows = batch.to_pylist()
            yield from rows
            return
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        try:
            yield RowError("too_large") if one.nbytes > limit else one.to_pylist()[0]
        except UnicodeDecodeError:
            yield RowError("not_utf8")


def _csv_row(header: list[str], fields: list[str]) -> RawRow | RowError:
    """Map the header to the fields of a row."""
    if len(fields) != len(header):
        return RowError("wrong_columns", f"{len(fields)} fields, {len(header)} in the header")
    if any(not field.isascii() and SURROGATE.search(field) for field in fields):
        return RowError("not_utf8")
    return dict(zip(header, fields, strict=True))
