"""Erase rows from a shard; all other rows keep their bytes and their numbers."""

import csv
import io
import logging
import sys
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path

from nightshift.core.files import atomic_write, file_digest, text_digest, write_json
from nightshift.raw.arrays import split_rows
from nightshift.raw.convert import convert, find_answers
from nightshift.raw.faults import RowError
from nightshift.raw.forgotten import Forgotten, read_forgotten, write_forgotten
from nightshift.raw.formats import SEPARATORS, shard_suffix, split_suffix
from nightshift.raw.options import read_options
from nightshift.raw.preferences import Answer
from nightshift.raw.readers import CsvLines, json_shape, read_shard
from nightshift.raw.repairs import repair
from nightshift.raw.shards import DIGESTS, read_digests
from nightshift.raw.streams import Limits, damaged, open_bytes, open_codec, skip_bom
from nightshift.raw.strict_json import dumps
from nightshift.raw.tables import TABLES, erase_table
from nightshift.raw.turns import Conversation

log = logging.getLogger(__name__)
# What is read of a row that compares nothing.
DEFAULT_ANSWER: tuple[Answer, ...] = ("good",)
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
    """Yield (number, conversation) for the rows of a shard that can be converted to a conversation.

    A row that compares two answers is two conversations.
    """
    options = read_options(shard.parent.parent, shard.parent.name)
    for number, row in read_shard(shard, NO_LIMITS):
        if not isinstance(row, RowError):
            with suppress(RowError, RecursionError):
                for answer in find_answers(row, options) or DEFAULT_ANSWER:
                    yield number, convert(row, options, answer)


def content_digest(conversation: Conversation) -> str:
    """Return the digest of a conversation's content, whatever its origin: BLAKE2b, 32 bytes in hex.

    The encoding is always repaired: a digest must not depend on a parameter.
    """
    contents = [
        [
            turn.role,
            turn.content if turn.role == "text" else turn.content.strip(),
            turn.name,
            [[call.name, call.arguments] for call in turn.calls],
            *([turn.reasoning.strip()] if turn.reasoning else []),
        ]
        for turn in repair(conversation, fix_encoding=True).turns
    ]
    return text_digest(dumps(contents), dumps(conversation.tools), size=32)


def erase_rows(path: Path, numbers: Set[int]) -> None:
    """Rewrite a shard without some of its rows.

    Erased rows leave placeholders that keep the numbering: blank lines, `null` in a JSON array, a row of
    nulls in a table. A JSON document other than JSON Lines becomes an array.

    Args:
        path: Path of the shard.
        numbers: Row numbers as in `nightshift.raw.readers.read_shard`.

    Raises:
        DataError: The shard is damaged.
    """
    form, codec = split_suffix(shard_suffix(path.name) or "")
    with atomic_write(path) as temporary:
        if form in TABLES:
            erase_table(path, temporary, form, numbers)
            return
        with open_bytes(path, codec, NO_LIMITS) as source, open_codec(temporary, codec, write=True) as target:
            skip_bom(path, source)
            for chunk in without_rows(path, form, source, numbers):
                target.write(chunk)


def without_rows(path: Path, form: str, source: io.BufferedReader, numbers: Set[int]) -> Iterator[bytes]:
    """Yield the bytes of a text shard without the rows."""
    shape = json_shape(path, NO_LIMITS) if form == "json" else "lines"
    if shape != "lines":
        yield b"["
        try:
            for number, element in enumerate(split_rows(source, shape, NO_LIMITS.row_bytes), start=1):
                yield b",\n" if number > 1 else b""
                yield b"null" if number in numbers else element or b""
        except ValueError as err:
            raise damaged(path, err) from err
        yield b"]\n"
        return
    if form == "txt":
        yield from without_documents(source, numbers)
        return
    lines = csv_lines(path, SEPARATORS[form], numbers) if form in SEPARATORS else numbers
    for number, line in enumerate(source, start=1):
        yield b"\n" if number in lines else line


def without_documents(source: io.BufferedReader, numbers: Set[int]) -> Iterator[bytes]:
    """Yield the lines of a text file, blank for the documents that begin at these lines."""
    is_erased, is_inside = False, False
    for number, line in enumerate(source, start=1):
        if not line.strip():
            is_erased = is_inside = False
        elif not is_inside:
            is_erased, is_inside = number in numbers, True
        yield b"\n" if is_erased else line


def csv_lines(path: Path, separator: str, numbers: Set[int]) -> set[int]:
    """Return the numbers of all lines of some CSV rows; a row's own number is that of its last line."""
    csv.field_size_limit(NO_LIMITS.row_bytes)
    found: set[int] = set()
    with open_bytes(path, split_suffix(shard_suffix(path.name) or "")[1], NO_LIMITS) as source:
        skip_bom(path, source)
        lines = CsvLines(source, NO_LIMITS.row_bytes)
        rows = csv.reader(lines, delimiter=separator, strict=True)
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
