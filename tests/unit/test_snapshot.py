"""New data comes in once, as shards that never change."""

from pathlib import Path

import pytest

from tasks.errors import DataError
from tasks.snapshot import SnapshotParams, contents, write_shards


def names(raw: Path) -> list[str]:
    return sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*"))


def test_only_new_bytes_make_a_shard(tmp_path: Path) -> None:
    assert len(write_shards("a", [b"1\n", b"1\n"], tmp_path)) == 1
    assert write_shards("a", [b"1\n"], tmp_path) == []
    assert names(tmp_path) == ["a/000001.jsonl"]


def test_arrivals_are_numbered_across_sources(tmp_path: Path) -> None:
    write_shards("a", [b"1\n"], tmp_path)
    write_shards("b", [b"2\n", b"3\n"], tmp_path)
    write_shards("a", [b"4\n"], tmp_path)
    assert names(tmp_path) == [
        "a/000001.jsonl",
        "a/000004.jsonl",
        "b/000002.jsonl",
        "b/000003.jsonl",
    ]


def test_a_glob_brings_in_each_file_and_no_file_is_an_error(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(name)
    assert list(contents(f"{tmp_path}/*.jsonl")) == [b"a.jsonl", b"b.jsonl"]
    with pytest.raises(DataError, match="matches no file"):
        list(contents(f"{tmp_path}/*.csv"))


def test_an_unknown_package_and_a_name_that_is_no_folder_are_refused() -> None:
    with pytest.raises(ValueError, match="known packages: mendeleev, chatterbot-corpus"):
        SnapshotParams(sources={"a": "package:nothing"}, benchmarks={})
    with pytest.raises(ValueError, match="becomes a folder"):
        SnapshotParams(sources={"../a": "x.jsonl"}, benchmarks={})
