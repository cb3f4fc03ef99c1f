"""The cache of values by content, and the manifest that clears it."""

import logging
import sqlite3
from pathlib import Path

import pytest

from nightshift.core.memo import Memo


def test_written_values_are_read_by_the_next_process(tmp_path: Path) -> None:
    with Memo("signatures", {"version": 1}, tmp_path) as memo:
        memo.write([("a", b"1"), ("b", b"2")])
    with Memo("signatures", {"version": 1}, tmp_path) as memo:
        assert memo.read(["a", "b", "c"]) == {"a": b"1", "b": b"2"}


def test_an_existing_key_keeps_its_value(tmp_path: Path) -> None:
    with Memo("answers", {}, tmp_path) as memo:
        memo.write([("a", b"first")])
        memo.write([("a", b"second")])
        assert memo.read(["a"]) == {"a": b"first"}


def test_another_method_empties_the_cache_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Memo("signatures", {"version": 1, "seed": 7}, tmp_path) as memo:
        memo.write([("a", b"1")])
    with (
        caplog.at_level(logging.WARNING),
        Memo("signatures", {"version": 2, "seed": 7}, tmp_path) as memo,
    ):
        assert memo.read(["a"]) == {}
    assert "version was 1, is 2" in caplog.text
    assert "seed" not in caplog.text


def test_more_keys_than_sqlite_can_bind_are_read_in_parts(tmp_path: Path) -> None:
    keys = [str(number) for number in range(40_000)]
    with Memo("many", {}, tmp_path) as memo:
        memo.write((key, key.encode()) for key in keys)
        assert memo.read(keys) == {key: key.encode() for key in keys}


def test_a_failed_write_stores_nothing(tmp_path: Path) -> None:
    with Memo("answers", {}, tmp_path) as memo:
        with pytest.raises(sqlite3.IntegrityError):
            memo.write([("a", b"1"), ("b", None)])  # type: ignore[list-item]
        assert memo.read(["a", "b"]) == {}
