"""New data is added once, as immutable shards."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.config import problems
from nightshift.core.errors import DataError
from tasks.snapshot import SnapshotParams
from tasks.snapshot.__main__ import write_benchmark, write_shards
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.locations import read_offers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def offers(*contents: bytes, suffix: str = ".jsonl") -> list[Offer]:
    return [Offer(suffix, [content[:1], content[1:]]) for content in contents]


def names(raw: Path) -> list[str]:
    return sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*"))


def test_only_new_bytes_become_a_shard(tmp_path: Path) -> None:
    assert len(write_shards("a", offers(b"1\n", b"1\n"), tmp_path)) == 1
    assert write_shards("a", offers(b"1\n"), tmp_path) == []
    assert names(tmp_path) == ["a/000001.jsonl"]
    assert (tmp_path / "a/000001.jsonl").read_bytes() == b"1\n"


def test_arrivals_are_numbered_across_sources_and_keep_the_suffix(tmp_path: Path) -> None:
    write_shards("a", offers(b"1\n"), tmp_path)
    write_shards("b", offers(b"2\n", b"3\n", suffix=".csv.gz"), tmp_path)
    write_shards("a", offers(b"4\n", suffix=".parquet"), tmp_path)
    assert names(tmp_path) == [
        "a/000001.jsonl",
        "a/000004.parquet",
        "b/000002.csv.gz",
        "b/000003.csv.gz",
    ]


def test_the_digest_of_each_shard_is_listed_also_of_manually_added_shards(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/000007.jsonl").write_bytes(b"old\n")
    assert write_shards("a", offers(b"old\n", b"new\n"), tmp_path) == [tmp_path / "a/000008.jsonl"]
    assert json.loads((tmp_path / "digests.json").read_text()) == {
        "a/000007.jsonl": hashlib.sha256(b"old\n").hexdigest(),
        "a/000008.jsonl": hashlib.sha256(b"new\n").hexdigest(),
    }


def test_an_interrupted_source_leaves_only_complete_shards(tmp_path: Path) -> None:
    def broken() -> Any:
        yield b"half"
        raise DataError("the store went away")

    with pytest.raises(DataError, match="went away"):
        write_shards("a", [*offers(b"1\n"), Offer(".jsonl", broken())], tmp_path)
    assert names(tmp_path) == ["a/000001.jsonl"]
    assert write_shards("a", offers(b"1\n", b"2\n"), tmp_path) == [tmp_path / "a/000002.jsonl"]


def test_a_glob_offers_each_file_with_its_suffix(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv.zst"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.jsonl").mkdir()
    found = [(offer.suffix, b"".join(offer.chunks)) for offer in read_offers(f"{tmp_path}/*")]
    assert found == [(".jsonl", b"a.jsonl"), (".jsonl", b"b.jsonl"), (".csv.zst", b"c.csv.zst")]


def test_no_matching_file_and_an_unknown_format_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match="matches no file"):
        list(read_offers(f"{tmp_path}/*.csv"))
    with pytest.raises(DataError, match=r"a\.docx: unknown format; use \.jsonl"):
        list(read_offers(f"{tmp_path}/*"))


def test_a_folder_instead_of_files_is_an_error_that_suggests_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=rf"{tmp_path} is a folder; add a glob, such as {tmp_path}/\*\.jsonl"):
        list(read_offers(str(tmp_path)))
    with pytest.raises(DataError, match=r"a\.jsonl/\*\.jsonl matches no file"):
        list(read_offers(f"{tmp_path}/a.jsonl/*.jsonl"))


def test_a_benchmark_that_is_no_folder_or_cannot_be_copied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/items.jsonl").symlink_to("gone")
    remedy = "set it to a folder with task.yaml and items.jsonl, or remove it from params.yaml"
    for name, problem in (
        ("moved", f"not found; {remedy}"),
        ("items.jsonl", f"is a file, not a folder; {remedy}"),
        ("half", r"\S+/half/items\.jsonl cannot be copied: .*; check permissions and disk space"),
    ):
        where = rf"^snapshot\.benchmarks\.mine: {tmp_path}/{name}: "
        with pytest.raises(DataError, match=f"{where}{problem}$"):
            write_benchmark("mine", f"{tmp_path}/{name}", tmp_path / "benchmarks")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3://", "names no bucket; write s3://bucket/glob"),
        ("package:nothing", "known packages: mendeleev, chatterbot-corpus"),
        ("hub:a/b@main", "a branch may move"),
        ("hub:a/b", "a branch may move"),
        ("http://example.org/a.jsonl", "scheme 'http' is not supported"),
        ("s3://AKIA:hush@bucket/a", "contains credentials"),
        ({"sql": "SELECT 1 ORDER BY 1"}, "the keys sql and url_env"),
        ({"sql": "SELECT 1 ORDER BY 1", "url_env": "postgresql://me:hush@db/x"}, "not the URL"),
        ({"sql": "SELECT 1 ORDER BY 1", "url_env": "DB", "url": "x://me:hush@db"}, "no others"),
        ({"sql": "SELECT 1", "url_env": "DB"}, "needs ORDER BY"),
    ],
)
def test_an_invalid_location_is_rejected_without_revealing_a_password(location: Any, message: str) -> None:
    found = problems(SnapshotParams, "snapshot", {"sources": {"a": location}, "benchmarks": {}})
    assert len(found) == 1
    assert message in found[0]
    assert "hush" not in found[0]


@pytest.mark.parametrize(
    "location",
    [
        "package:mendeleev",
        "mine/**/*.jsonl",
        "s3://bucket/a/*.parquet",
        "gs://bucket/a.csv.gz",
        f"hub:owner/name@{COMMIT}",
        f"hub:owner/name@{COMMIT}/data/train-*",
        {"sql": "SELECT text FROM notes ORDER BY id", "url_env": "WAREHOUSE_URL"},
    ],
)
def test_every_kind_of_location_is_accepted(location: Any) -> None:
    assert problems(SnapshotParams, "snapshot", {"sources": {"a": location}, "benchmarks": {}}) == []


def test_an_invalid_name_and_an_unknown_benchmark_are_rejected() -> None:
    with pytest.raises(ValueError, match="is used as a folder name"):
        SnapshotParams(sources={"../a": "x.jsonl"}, benchmarks={})
    with pytest.raises(ValueError, match="known packages: mendeleev"):
        SnapshotParams(sources={}, benchmarks={"a": "package:chatterbot-corpus"})
    with pytest.raises(ValueError, match="'test' is reserved for the held-out examples"):
        SnapshotParams(sources={}, benchmarks={"test": "package:mendeleev"})
