"""The rows that a source contributes: its limit, its groups, and the faults of outdated versions."""

import json
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.errors import DataError
from nightshift.raw.faults import RowError
from nightshift.raw.options import SourceOptions, write_options
from nightshift.raw.selection import Selection, find_group
from nightshift.raw.streams import Limits
from nightshift.raw.versions import Versions, write_versions

LIMITS = Limits(1000, 10**6, 100)


def write_shard(raw: Path, name: str, *lines: object) -> Path:
    path = raw / name
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"row {i}"} for i in range(count)]


def test_the_first_rows_of_a_source_are_used_over_all_its_shards(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path, "a/000001.jsonl", {"text": "1"}, "bad", {"text": "3"}),
        write_shard(tmp_path, "b/000002.jsonl", *texts(3)),
        write_shard(tmp_path, "a/000003.jsonl", {"text": "4"}, "bad", "bad"),
    ]
    write_options(tmp_path, {"a": SourceOptions(limit=4), "b": SourceOptions()})
    selection = Selection(tmp_path)
    numbers = [[number for number, _ in selection.rows(shard, LIMITS)] for shard in shards]
    assert numbers == [[1, 2, 3], [1, 2, 3], [1]]
    # The bad rows beyond the limit are not read as bad.
    assert selection.counts() == {"rows_over_limit": {"a": 2}}


def test_a_share_of_the_rows_is_chosen_by_content(tmp_path: Path) -> None:
    rows = texts(1000)
    chosen = []
    for name, some, share in (
        ("a/000001.jsonl", rows, 0.2),
        ("a/000002.jsonl", rows[::-1], 0.2),
        ("a/000003.jsonl", rows, 0.5),
    ):
        write_options(tmp_path, {"a": SourceOptions(limit=share)})
        selection = Selection(tmp_path)
        found = selection.rows(write_shard(tmp_path, name, *some), LIMITS)
        chosen.append({row["text"] for _, row in found if not isinstance(row, RowError)})
        assert selection.over_limit["a"] == 1000 - len(chosen[-1])
    assert 150 < len(chosen[0]) < 250
    # Neither order nor shard matter, and a larger share keeps the rows of a smaller one.
    assert chosen[0] == chosen[1] < chosen[2]


def test_a_damaged_shard_of_which_a_newer_version_arrived_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    bad = tmp_path / "a/000001.parquet"
    bad.write_bytes(b"PAR1 truncated")
    with pytest.raises(DataError, match="damaged"):
        list(Selection(tmp_path).rows(bad, LIMITS))
    write_versions(tmp_path, {"a": Versions({"x.parquet": ["a/000001.parquet", "a/000002.parquet"]})})
    selection = Selection(tmp_path)
    assert list(selection.rows(bad, LIMITS)) == []
    assert selection.counts() == {"rows_mended": {"a": 1}}
    assert "a newer version of the file arrived, so this is ignored" in caplog.text


def test_only_the_faults_of_outdated_shards_do_not_count(tmp_path: Path) -> None:
    write_versions(tmp_path, {"a": Versions({"x": ["a/1", "a/2"], "y": ["a/3"]})})
    selection = Selection(tmp_path)
    fault = RowError("not_utf8")
    found = [(shard, selection.is_mended(shard, fault)) for shard in ("a/1", "a/2", "a/3", "b/1")]
    assert found == [("a/1", True), ("a/2", False), ("a/3", False), ("b/1", False)]
    assert not selection.is_mended("a/1", {"messages": []})
    assert selection.mended == {"a": 1}


def test_a_group_is_found_by_a_name_with_dots_or_a_path() -> None:
    assert find_group({"a": {"b": {"c": 1}}}, "a.b.c") == find_group({"a.b.c": "1 "}, "a.b.c")
    assert find_group({"id": 1}, "id") != find_group({"id": 2}, "id")
    assert find_group({"id": 1}, "id") != find_group({"no": 1}, "no")
    for row in ({}, {"a": 1}, {"a": []}, {"a": {"b": None}}, {"a": {"b": ""}}):
        assert find_group(row, "a.b") is None
    # The value is not stored: it could be personal data.
    assert "ada" not in str(find_group({"mail": "ada@example.org"}, "mail"))


def test_a_group_column_that_no_row_has_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    write_options(tmp_path, {"a": SourceOptions(group_by="custmer"), "b": SourceOptions(group_by="customer")})
    selection = Selection(tmp_path)
    assert selection.group({"customer": 1, "text": "x"}, "a") is None
    assert selection.group({"customer": 1}, "b") is not None
    assert selection.group({"text": "x"}, "b") is None
    with pytest.raises(
        DataError, match=r"a\.group_by: none of 1 rows has a value of 'custmer'; did you mean customer\?"
    ):
        selection.require_groups()
    assert selection.counts() == {"rows_ungrouped": {"a": 1, "b": 1}}
    assert selection.group({"text": "x"}, "c") is None
