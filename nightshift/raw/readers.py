"""Numbered rows of a shard, one at a time: JSON, CSV, text; `nightshift.raw.tables` reads the rest.

An unreadable row is yielded as a `RowError`. If the rest of a shard cannot be read, the stage fails.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nightshift.core.errors import DataError
from nightshift.raw.arrays import Shape, find_shape, split_rows
from nightshift.raw.columns import column_name
from nightshift.raw.faults import RowError
from nightshift.raw.formats import SEPARATORS, RawRow, shard_suffix, split_suffix
from nightshift.raw.streams import Limits, damaged, not_utf8, open_bytes, read_line, skip_bom
from nightshift.raw.strict_json import DuplicateKeyError, loads_row
from nightshift.raw.tables import TABLES, Numbered, read_table

ESCAPE = re.compile(r"\\u[dD]")
SURROGATE = re.compile("[\ud800-\udfff]")


def read_shard(path: Path, limits: Limits) -> Numbered:
    """Yield (number, row or error) for every row of a shard.

    Numbers start at 1: lines of JSON Lines, CSV and text, elements of a JSON array, rows of a table.

    Raises:
        DataError: The shard is damaged, is not UTF-8, or exceeds the limits.
    """
    if not path.stat().st_size:
        yield 1, RowError("empty_file")
        return
    form, codec = split_suffix(shard_suffix(path.name) or "")
    if form in TABLES:
        yield from read_table(path, TABLES[form], limits)
        return
    shape = json_shape(path, limits) if form == "json" else "lines"
    with open_bytes(path, codec, limits) as file:
        skip_bom(path, file)
        if form in SEPARATORS:
            yield from read_csv(path, file, limits.row_bytes, SEPARATORS[form])
        elif form == "txt":
            yield from read_documents(file, limits.row_bytes)
        elif shape == "lines":
            yield from read_json_lines(file, limits.row_bytes)
        else:
            yield from read_document(path, file, shape, limits.row_bytes)


def json_shape(path: Path, limits: Limits) -> Shape:
    """Return how a .json file contains its rows.

    Raises:
        DataError: It contains several lists of rows, or is not UTF-8.
    """
    with open_bytes(path, split_suffix(shard_suffix(path.name) or "")[1], limits) as file:
        skip_bom(path, file)
        try:
            return find_shape(file)
        except ValueError as err:
            raise DataError(f"{path}: {err}") from err


def read_documents(file: io.BufferedReader, limit: int) -> Numbered:
    """Yield the documents of a text file, which blank lines separate; a number is that of its first line."""
    number, first, lines, size = 0, 0, list[bytes](), 0
    while (line := read_line(file, limit)) != b"":
        number += 1
        if line is not None and not line.strip():
            if size:
                yield first, _document(lines, size, limit)
            lines, size = [], 0
            continue
        first = first if size else number
        size += limit + 1 if line is None else len(line)
        if size <= limit and line is not None:
            lines.append(line)
    if size:
        yield first, _document(lines, size, limit)


def _document(lines: list[bytes], size: int, limit: int) -> RawRow | RowError:
    """Return a document as a row of text."""
    if size > limit:
        return RowError("too_large")
    try:
        return {"text": b"".join(lines).decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError:
        return RowError("not_utf8")


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
        row = loads_row(text)
    except UnicodeDecodeError:
        return RowError("not_utf8")
    except RecursionError:
        return RowError("too_deep")
    except DuplicateKeyError as err:
        return RowError("duplicate_key", column_name(str(err)))
    except ValueError as err:
        place = f"column {err.colno}" if isinstance(err, json.JSONDecodeError) else ""
        return RowError("malformed_json", place)
    if not isinstance(row, dict):
        return RowError("not_an_object")
    # In valid UTF-8, only an escape can produce a lone surrogate.
    if ESCAPE.search(text) and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return RowError("lone_surrogate")
    return row


def read_document(path: Path, file: io.BufferedReader, shape: Shape, limit: int) -> Numbered:
    """Yield the rows of a JSON document that is not JSON Lines.

    Raises:
        DataError: The array is not closed, or data follows it.
    """
    try:
        for number, element in enumerate(split_rows(file, shape, limit), start=1):
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


def read_csv(path: Path, file: io.BufferedReader, limit: int, separator: str = ",") -> Numbered:
    """Yield the rows of a CSV file with a header; a row's number is that of its last line.

    Raises:
        DataError: The header has no or duplicate column names, another separator or encoding, or a quote
            is never closed.
    """
    csv.field_size_limit(limit)
    lines = CsvLines(file, limit)
    rows = csv.reader(lines, delimiter=separator, strict=True)
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
            require_header(path, header)
        elif fields:
            yield lines.number, _csv_row(header, fields)


def require_header(path: Path, header: list[str]) -> None:
    """Check the first line of a CSV file.

    Raises:
        DataError: It has no or duplicate column names, another separator, or is not UTF-8.
    """
    if any(SURROGATE.search(name) for name in header):
        raise not_utf8(path, "in another encoding")
    if not any(header) or len(set(header)) < len(header):
        raise damaged(path, "line 1: the header has no column names or a duplicate")
    other = next((sign for sign in (";", "\t", "|", ",") if sign in header[0]), None)
    if len(header) == 1 and other:
        raise DataError(
            f"{path}: line 1: the columns are separated by {other!r}; save the source file with commas as "
            ".csv, or with tabs as .tsv, and run `nightshift snapshot`"
        )


def _csv_row(header: list[str], fields: list[str]) -> RawRow | RowError:
    """Map the header to the fields of a row."""
    if len(fields) != len(header):
        return RowError("wrong_columns", f"{len(fields)} fields, {len(header)} in the header")
    if any(not field.isascii() and SURROGATE.search(field) for field in fields):
        return RowError("not_utf8")
    return dict(zip(header, fields, strict=True))
