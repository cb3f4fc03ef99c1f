"""File I/O for stages: atomic writes, Parquet rows, content digests.

Every write goes to a temporary file that is renamed when complete, so a killed stage never leaves a
partial file under the final name.
"""

import glob
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_BATCH = 10_000
log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process and thread: others may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    remove_stale(path)
    try:
        with named_errors(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one: if the disk is full, writing to an open file names no file."""
    try:
        yield
    except OSError as err:
        # Without errno, the message would be lost.
        if err.errno and not err.filename:
            err.filename = str(path)
        raise


def remove_stale(path: Path) -> None:
    """Remove what killed processes have left of a file."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        owner = stale.name.removeprefix(f".{path.name}.").partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            stale.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically with sorted keys, so equal values give identical bytes.

    Raises:
        ValueError: A number is not finite; see `write_figures`.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_figures(path: Path, value: object) -> None:
    """Write computed metrics as JSON, with null for non-finite numbers.

    A metric that is only reported must not fail a stage. Code that decides on a value checks it there.
    """
    write_json(path, finite(value))


def finite(value: object) -> object:
    """Replace every non-finite number in a JSON value with None.

    Example:
        >>> finite({"loss": float("nan"), "bands": [0.1, float("inf")]})
        {'loss': None, 'bands': [0.1, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_state(path: Path) -> dict[str, Any] | None:
    """Read a JSON object of the state folder; None if the file is missing, or damaged, which is logged.

    A disk that fills up or loses power leaves such a file, and no later run may fail for it.
    """
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it contains no object")
    except FileNotFoundError:
        return None
    except ValueError as err:
        log.warning("%s is damaged (%s) and not used", path, err)
        return None
    return found


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Format rows as JSON Lines with sorted keys.

    Example:
        >>> jsonl([{"b": 1, "a": "é"}])
        '{"a": "é", "b": 1}\n'
    """
    return "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as Parquet, atomically and in batches. The bytes depend only on rows and schema."""
    remaining = iter(rows)
    batches = iter(lambda: list(islice(remaining, ROWS_PER_BATCH)), [])
    write_batches(path, (pa.RecordBatch.from_pylist(batch, schema=schema) for batch in batches), schema)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write record batches as Parquet atomically; each non-empty batch becomes a row group."""
    with appended_batches(path, schema) as append:
        for batch in batches:
            append(batch)


@contextmanager
def appended_batches(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Yield a function that appends a record batch to a Parquet file, which replaces `path` on success."""
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:

        def append(batch: pa.RecordBatch) -> None:
            if batch.num_rows:
                writer.write_batch(batch.cast(schema))

        yield append


@contextmanager
def appended_rows(path: Path, schema: pa.Schema) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """Yield a function that appends rows to a Parquet file, which replaces `path` on success."""
    with appended_batches(path, schema) as append:
        yield lambda rows: append(pa.RecordBatch.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet atomically."""
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROWS_PER_BATCH)


def read_rows(path: Path) -> list[Any]:
    """Read all rows of a Parquet file as dicts; nightshift.data.schemas has their types."""
    rows: list[Any] = pq.read_table(path).to_pylist()
    return rows


def iterate_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Yield the rows of a Parquet file as dicts, with one batch in memory at a time."""
    for batch in iterate_batches(path, columns):
        yield from batch.to_pylist()


def iterate_batches(
    path: Path, columns: Sequence[str] | None = None, rows: int = ROWS_PER_BATCH
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a Parquet file, of at most `rows` rows each."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=rows, columns=columns)


def data_size(path: Path) -> int:
    """Return the size of the rows of a Parquet file before compression, in bytes."""
    metadata = pq.read_metadata(path)
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def text_digest(*parts: str, size: int = 8) -> str:
    """Return the digest of a sequence of strings and their boundaries: `size` bytes, in hex.

    Example:
        >>> text_digest("ab", "c") == text_digest("a", "bc")
        False
    """
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def hash_share(text: str) -> float:
    """Return the hash of a text as a number from 0 to below 1.

    Example:
        >>> hash_share("a") == hash_share("a"), 0 <= hash_share("b") < 1
        (True, True)
    """
    return int(text_digest(text), 16) / 2**64


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(*roots: Path) -> str:
    """Return the SHA-256 over the relative names and bytes of all files in the roots, in hex.

    A root that is a file counts under its own name. `__pycache__` is ignored.
    """
    state = hashlib.sha256()
    for root in roots:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in files:
            if "__pycache__" in path.parts:
                continue
            name = path.relative_to(root.parent).as_posix()
            state.update(f"{name}\0{file_digest(path)}\n".encode())
    return state.hexdigest()
