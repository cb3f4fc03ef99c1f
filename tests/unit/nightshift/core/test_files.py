"""Files that stages exchange."""

import os
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from nightshift.core.files import (
    appended_rows,
    atomic_write,
    file_digest,
    iterate_batches,
    iterate_rows,
    read_json,
    read_rows,
    read_state,
    text_digest,
    tree_digest,
    write_figures,
    write_json,
    write_rows,
    write_text,
)

SCHEMA = pa.schema([("a", pa.int32()), ("b", pa.string())])


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_several_runs_write_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "scoreboard.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_json(path, {"run": number}), range(400)))
    assert read_json(path)["run"] in range(400)
    assert [one.name for one in tmp_path.iterdir()] == ["scoreboard.json"]


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    left = [f".x.json.{ended.pid}-1.tmp", f".x.json.{os.getpid()}-1.tmp", f".y.json.{ended.pid}-1.tmp"]
    for name in left:
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "x.json", {})
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([*left[1:], "x.json"])


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
    try:
        with pytest.raises(OSError, match=rf"^\[Errno 27\] File too large: '{path}'$"):
            write_text(path, "more than a byte")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.raises(OSError, match=r"^the library has no number$"), atomic_write(path):
        raise OSError("the library has no number")


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b'{"a": 1', b'{"a": "\xff"}', b"[1]", b"null"])
def test_a_damaged_file_of_the_state_folder_counts_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "state.json"
    assert read_state(path) is None
    write_json(path, {"a": 1})
    assert read_state(path) == {"a": 1}
    assert caplog.messages == []
    path.write_bytes(content)
    assert read_state(path) is None
    assert caplog.messages[0].startswith(f"{path} is damaged (")


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "é"}, {"a": None, "b": ""}]
    for name in ("one", "two"):
        write_rows(tmp_path / name, rows, SCHEMA)
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    assert read_rows(tmp_path / "one") == rows


def test_json_rejects_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_non_finite_figures_are_written_as_null(tmp_path: Path) -> None:
    figures = {"gain": {"power": float("nan"), "low": 0.1}, "bands": (float("inf"), 1), "verdict": "hold"}
    write_figures(tmp_path / "x.json", figures)
    assert read_json(tmp_path / "x.json") == {
        "gain": {"power": None, "low": 0.1},
        "bands": [None, 1],
        "verdict": "hold",
    }


def test_a_tree_digest_depends_on_names_and_bytes_but_not_on_location(tmp_path: Path) -> None:
    for place in ("p", "q"):
        write_text(tmp_path / place / "model" / "a.txt", "1")
    assert tree_digest(tmp_path / "p" / "model") == tree_digest(tmp_path / "q" / "model")
    before = tree_digest(tmp_path / "p" / "model")
    (tmp_path / "p" / "model" / "a.txt").rename(tmp_path / "p" / "model" / "b.txt")
    assert tree_digest(tmp_path / "p" / "model") != before


def test_a_text_digest_is_stable() -> None:
    assert text_digest("a", "b") == "cfb9cbd0aeeea44e"
    assert text_digest("a", "b") != text_digest("b", "a")


def test_rows_are_read_in_batches_and_in_order(tmp_path: Path) -> None:
    schema = pa.schema([("number", pa.int64())])
    write_rows(tmp_path / "rows.parquet", ({"number": i} for i in range(25_000)), schema)
    assert [batch.num_rows for batch in iterate_batches(tmp_path / "rows.parquet")] == [10_000, 10_000, 5000]
    assert [row["number"] for row in iterate_rows(tmp_path / "rows.parquet")] == list(range(25_000))


def test_appended_rows_appear_only_when_complete(tmp_path: Path) -> None:
    schema = pa.schema([("number", pa.int64())])
    target = tmp_path / "rows.parquet"
    with pytest.raises(ZeroDivisionError), appended_rows(target, schema) as append:
        append([{"number": 1}])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with appended_rows(target, schema) as append:
        append([{"number": 1}])
        append([])
        append([{"number": 2}])
    assert [row["number"] for row in iterate_rows(target)] == [1, 2]
