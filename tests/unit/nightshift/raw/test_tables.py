"""Tables give the same rows as JSON Lines; what Arrow adds is taken out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.core.errors import DataError
from nightshift.raw.readers import read_shard
from nightshift.raw.streams import Limits

LIMITS = Limits(row_bytes=10**6, shard_bytes=10**9, ratio=200)
ROWS: list[dict[str, Any]] = [
    {
        "tools": [{"name": "f", "parameters": {"x": {"type": "string"}}}],
        "calls": [{"arguments": {"city": "Rome"}}],
    },
    {
        "tools": [{"name": "g", "parameters": {"y": {"type": "number"}}}],
        "calls": [{"arguments": {"to": "Oslo"}}],
    },
]


def write(path: Path, table: pa.Table, kind: str, **options: Any) -> Path:
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    create = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with create(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=1000)
    return path


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_nulls_that_pad_structs_are_taken_out(tmp_path: Path, kind: str) -> None:
    suffix = ".parquet" if kind == "parquet" else ".arrow"
    path = write(tmp_path / f"a{suffix}", pa.Table.from_pylist(ROWS), kind)
    assert list(read_shard(path, LIMITS)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_null_that_an_author_wrote_stays(tmp_path: Path) -> None:
    row = {"calls": [{"arguments": json.dumps({"to": None})}], "list": [None, "a"], "none": None}
    path = write(tmp_path / "a.parquet", pa.Table.from_pylist([row]), "parquet")
    assert list(read_shard(path, LIMITS)) == [(1, row)]
    (tmp_path / "a.jsonl").write_text('{"arguments": {"to": null}}')
    assert list(read_shard(tmp_path / "a.jsonl", LIMITS)) == [(1, {"arguments": {"to": None}})]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_batches_are_numbered_through(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": [str(number) for number in range(2500)]})
    path = write(tmp_path / "a.arrow", table, kind, compression="zstd")
    assert list(read_shard(path, LIMITS)) == [(n + 1, {"text": str(n)}) for n in range(2500)]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_bomb_is_stopped(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": [" " * 100_000] * 1000})
    path = write(tmp_path / "a.arrow", table, kind, compression="zstd")
    with pytest.raises(DataError, match=r"expand to \d+ or more.*max_compression_ratio=200"):
        list(read_shard(path, LIMITS))
    with pytest.raises(DataError, match="max_shard_bytes=1000"):
        list(read_shard(path, Limits(10**6, 1000, 10**6)))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_truncated_arrow_file_is_an_error(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / "whole", pa.table({"text": ["a" * 1000] * 3000}), kind).read_bytes()
    for size in (4, 100, len(whole) // 2):
        (tmp_path / "a.arrow").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.arrow: damaged or truncated"):
            list(read_shard(tmp_path / "a.arrow", LIMITS))


def test_feather_of_version_1_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    with pytest.raises(DataError, match=r"a\.feather: damaged or truncated"):
        list(read_shard(tmp_path / "a.feather", LIMITS))
