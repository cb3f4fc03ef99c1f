"""New data is added once, as immutable shards."""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.config import problems
from nightshift.core.errors import DataError
from nightshift.core.files import tree_digest
from nightshift.core.memo import Memo
from nightshift.raw.erase import forget_rows
from nightshift.raw.forgotten import Forgotten
from nightshift.raw.shards import used_shards
from nightshift.raw.versions import outdated_shards
from tasks.snapshot import SnapshotParams
from tasks.snapshot.__main__ import arrived, write_benchmark, write_shards
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
        ("ftp://example.org/a.jsonl", "scheme 'ftp' is not supported"),
        ("https://me:hush@example.org/a.jsonl", "contains credentials"),
        ("https://example.org/a.jsonl?X-Amz-Signature=hush", "'X-Amz-Signature', which looks like a secret"),
        ("https://example.org/a.jsonl?sas=1&access_token=hush", "'access_token', which looks like a secret"),
        ("https://example.org/download?id=7", "has no known format; its path must end in .jsonl"),
        ("https:///a.jsonl", "names no host"),
        ("https://example.org:port/a.jsonl", "not a valid URL"),
        ("s3://AKIA:hush@bucket/a", "contains credentials"),
        ({"sql": "SELECT 1 ORDER BY 1"}, "needs either `path`, or both `sql` and `url_env`"),
        ({"sql": "SELECT 1 ORDER BY 1", "url_env": "postgresql://me:hush@db/x"}, "not the URL"),
        ({"sql": "SELECT 1 ORDER BY 1", "url_env": "DB", "url": "x://me:hush@db"}, "unknown key"),
        ({"sql": "SELECT 1", "url_env": "DB"}, "needs ORDER BY"),
        ({"sql": ["hush"], "url_env": "DB"}, "a.sql: must be text, got a value of type list"),
        ({"path": {"hush": 1}}, "a.path: must be text, got a value of type dict"),
        ({"path": ""}, "a.path: must be text, got nothing"),
        ({"path": "a.jsonl", "sql": "SELECT 1 ORDER BY 1", "url_env": "DB"}, "needs either"),
        ({}, "needs either"),
        ({"mode": "replace"}, "needs either"),
        (
            ["x://me:hush@db"],
            "must be a location, or a mapping with `path` or `sql`, got a value of type list",
        ),
        (None, "got nothing"),
        (7, "got a value of type int"),
        ({"path": "package:mendeleev", "split": "train"}, "`split` chooses among files"),
        ({"sql": "SELECT 1 ORDER BY 1", "url_env": "DB", "split": "train"}, "`split` chooses among files"),
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
        {"sql": "SELECT text FROM notes ORDER BY id", "url_env": "WAREHOUSE_URL", "mode": "replace"},
        "https://example.org/a%20b.jsonl.gz?download=true",
        "http://127.0.0.1:8000/a.parquet",
        {"path": "~/exports", "split": "train", "limit": 100, "weight": 0.5, "group_by": "metadata.customer"},
        {"path": "s3://bucket/a", "columns": {"instruction": "question"}, "roles": {"bot": "assistant"}},
    ],
)
def test_every_kind_of_location_is_accepted(location: Any) -> None:
    assert problems(SnapshotParams, "snapshot", {"sources": {"a": location}, "benchmarks": {}}) == []


def test_all_problems_of_all_sources_are_reported_at_once_with_suggestions() -> None:
    sources = {
        "a": {"pth": "x.jsonl", "mode": "replce", "limit": 0},
        "b": {"path": "hub:a/b@main", "wieght": 2, "roles": {"bot": "asistant"}},
        "c": 3,
        "d": {"path": "x.jsonl", "weight": 0, "limit": 1.5, "split": "", "group_by": 7},
    }
    assert problems(SnapshotParams, "snapshot", {"sources": sources, "benchmarks": {}}) == [
        "snapshot.sources.a.limit: must be a number of rows from 1, or a share between 0 and 1, got 0",
        "snapshot.sources.a.mode: Input should be 'append' or 'replace', got 'replce'; did you mean replace?",
        "snapshot.sources.a.path: a source needs either `path`, or both `sql` and `url_env`",
        "snapshot.sources.a.pth: unknown key; did you mean path?",
        "snapshot.sources.b.path: 'hub:a/b@main' must be hub:<owner>/<name>@<40 hex digits of a commit>, "
        "optionally with /<glob>; a branch may move",
        "snapshot.sources.b.roles.bot: Input should be 'system', 'user', 'assistant' or 'tool', got "
        "'asistant'; did you mean assistant?",
        "snapshot.sources.b.wieght: unknown key; did you mean weight?",
        "snapshot.sources.c: must be a location, or a mapping with `path` or `sql`, got a value of type int",
        "snapshot.sources.d.group_by: Input should be a valid string, got 7",
        "snapshot.sources.d.limit: must be a number of rows from 1, or a share between 0 and 1, got 1.5",
        "snapshot.sources.d.split: String should have at least 1 character, got ''",
        "snapshot.sources.d.weight: Input should be greater than 0, got 0",
    ]


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "a b", "A", "é", "1a", "", "a" * 65, True, 2024, None, "a.b"]
)
def test_a_name_that_cannot_be_a_folder_is_one_line(name: Any) -> None:
    sources = {"sources": {name: "x.jsonl"}, "benchmarks": {}}
    (found,) = problems(SnapshotParams, "snapshot", sources)
    assert f"{name!r} is used as a folder name; use only a-z, 0-9 and _" in found
    assert found.startswith("snapshot.sources.")
    (found,) = problems(SnapshotParams, "snapshot", {"sources": {"a": "b"}, "benchmarks": {name: "x"}})
    assert f"{name!r} is used as a folder name" in found


def test_no_sources_and_an_unknown_benchmark_are_rejected() -> None:
    (found,) = problems(SnapshotParams, "snapshot", {"sources": {}, "benchmarks": {}})
    assert found == "snapshot.sources: no sources; add one, such as `chats: data/chats/*.jsonl`"
    with pytest.raises(ValueError, match="known packages: mendeleev"):
        SnapshotParams(sources={}, benchmarks={"a": "package:chatterbot-corpus"})
    with pytest.raises(ValueError, match="'test' is reserved for the held-out examples"):
        SnapshotParams(sources={}, benchmarks={"test": "package:mendeleev"})


def exported(*contents: str, names: tuple[str, ...] = ("a.jsonl", "b.jsonl")) -> list[Offer]:
    """Return offers of files with names."""
    return [Offer(".jsonl", [text.encode()], name) for name, text in zip(names, contents, strict=False)]


def used(raw: Path) -> list[str]:
    return [path.relative_to(raw).as_posix() for _, path in used_shards(raw)]


def test_the_newest_export_is_the_whole_source(tmp_path: Path) -> None:
    write_shards("a", exported("1\n", "2\n"), tmp_path, "replace")
    write_shards("other", exported("x\n"), tmp_path)
    assert used(tmp_path) == ["a/000001.jsonl", "a/000002.jsonl", "other/000003.jsonl"]
    # One file changes, the other is gone: both old shards are withdrawn, and stay on disk.
    write_shards("a", exported("3\n"), tmp_path, "replace")
    assert used(tmp_path) == ["a/000004.jsonl", "other/000003.jsonl"]
    assert len(names(tmp_path)) == 4
    # An earlier export is current again, without a new shard.
    assert write_shards("a", exported("1\n", "2\n"), tmp_path, "replace") == []
    assert used(tmp_path) == ["a/000001.jsonl", "a/000002.jsonl", "other/000003.jsonl"]
    # In mode append, everything that ever arrived is used.
    write_shards("a", exported("1\n"), tmp_path)
    assert len(used(tmp_path)) == 4


def test_an_unchanged_export_changes_no_byte_even_under_a_new_name(tmp_path: Path) -> None:
    for mode in ("append", "replace"):
        write_shards("a", exported("1\n", "2\n"), tmp_path, mode)  # type: ignore[arg-type]
        before = tree_digest(tmp_path)
        write_shards("a", exported("2\n", "1\n", names=("b.jsonl", "a.jsonl")), tmp_path, mode)  # type: ignore[arg-type]
        write_shards("a", exported("1\n", "2\n", names=("day2-a.jsonl", "day2-b.jsonl")), tmp_path, mode)  # type: ignore[arg-type]
        assert tree_digest(tmp_path) == before


def test_an_export_that_fails_half_way_withdraws_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield b"half"
        raise DataError("the store went away")

    write_shards("a", exported("1\n"), tmp_path, "replace")
    with pytest.raises(DataError, match="went away"):
        write_shards("a", [*exported("2\n"), Offer(".jsonl", broken(), "b.jsonl")], tmp_path, "replace")
    assert used(tmp_path) == ["a/000001.jsonl"]
    write_shards("a", exported("2\n", "3\n"), tmp_path, "replace")
    assert used(tmp_path) == ["a/000002.jsonl", "a/000003.jsonl"]


def test_an_export_from_which_rows_were_erased_stays_current(tmp_path: Path) -> None:
    rows = '{"text": "one"}\n{"text": "two"}\n'
    (shard,) = write_shards("a", exported(rows), tmp_path, "replace")
    forget_rows(shard, {2}, tmp_path, Forgotten())
    assert write_shards("a", exported(rows), tmp_path, "replace") == []
    assert used(tmp_path) == ["a/000001.jsonl"]


def test_an_older_version_of_a_file_is_outdated_until_it_returns(tmp_path: Path) -> None:
    write_shards("a", exported("1\n", "1\n"), tmp_path)
    write_shards("a", exported("2\n", "1\n"), tmp_path)
    # The other file still has the first bytes.
    assert outdated_shards(tmp_path) == set()
    write_shards("a", exported("2\n", "3\n"), tmp_path)
    assert outdated_shards(tmp_path) == {"a/000001.jsonl"}
    assert len(used(tmp_path)) == 3
    write_shards("a", exported("1\n", "3\n"), tmp_path)
    assert outdated_shards(tmp_path) == {"a/000002.jsonl"}


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    def once(text: str, version: str) -> Offer:
        def read() -> Any:
            opened.append(version)
            yield text.encode()

        return Offer(".jsonl", read(), text, version)

    opened: list[str] = []
    with Memo("sources", {}, tmp_path / "memo") as memo:
        for texts in (["1", "2"], ["1", "2", "3"]):
            write_shards("a", [once(text, f"v{text}") for text in texts], tmp_path / "raw", memo=memo)
        assert opened == ["v1", "v2", "v3"]
        # A shard that is gone is read again.
        (tmp_path / "raw/a/000002.jsonl").unlink()
        write_shards("a", [once("2", "v2")], tmp_path / "raw", memo=memo)
    assert opened == ["v1", "v2", "v3", "v2"]


def test_a_past_night_has_only_the_files_that_had_arrived(in_tmp: Path) -> None:
    for day in (1, 2, 3):
        file = in_tmp / f"{day}.jsonl"
        file.write_text(f"{day}\n")
        moment = datetime(2026, 1, day, tzinfo=UTC).timestamp()
        os.utime(file, (moment, moment))
    for night in (1, 2):
        until = datetime(2026, 1, night, 2, tzinfo=UTC)
        write_shards("a", arrived(read_offers("*.jsonl"), until), in_tmp / "raw")
        assert len(names(in_tmp / "raw")) == night
    write_shards("a", arrived(read_offers("*.jsonl"), None), in_tmp / "raw")
    assert [(in_tmp / "raw" / name).read_text() for name in names(in_tmp / "raw")] == ["1\n", "2\n", "3\n"]
    # What does not say when it changed is always offered.
    assert len(list(arrived(offers(b"1\n"), until))) == 1
