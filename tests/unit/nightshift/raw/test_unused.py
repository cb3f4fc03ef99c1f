"""Unused data on disk is reported by name and size."""

from pathlib import Path

import pytest

from nightshift.core.files import write_json, write_text
from nightshift.raw.unused import unused_by_params, unused_by_snapshot


@pytest.fixture
def data(in_tmp: Path) -> Path:
    """Create two sources and two benchmarks; the last snapshot used one of each."""
    write_text(in_tmp / "params.yaml", "snapshot: {sources: {new: x, old: y}, benchmarks: {}}")
    for name in ("new/000002.jsonl", "old/000001.jsonl", "old/000003.jsonl.gz"):
        write_text(in_tmp / "data/raw" / name, "x" * 600)
    # Left by an aborted attempt.
    (in_tmp / "data/raw/none").mkdir()
    write_json(in_tmp / "data/raw/used.json", ["new"])
    for name in ("active", "idle"):
        write_text(in_tmp / "data/benchmarks" / name / "items.jsonl", "x" * 2_500_000)
    write_json(in_tmp / "data/benchmarks/used.json", ["active"])
    return in_tmp / "data"


@pytest.mark.usefixtures("data")
def test_the_report_lists_data_that_the_snapshot_did_not_use() -> None:
    assert unused_by_snapshot() == ["source old: 2 shards, 1.2 kB", "benchmark idle: 2.5 MB"]


@pytest.mark.usefixtures("data")
def test_the_status_lists_data_that_params_yaml_does_not_list() -> None:
    assert unused_by_params() == ["benchmark active: 2.5 MB", "benchmark idle: 2.5 MB"]


@pytest.mark.parametrize(
    ("text", "count"), [("snapshot: [1", 0), ("snapshot:", 4), ("snapshot: {sources: , benchmarks: }", 4)]
)
@pytest.mark.usefixtures("data")
def test_the_status_works_with_a_broken_params_yaml(text: str, count: int) -> None:
    Path("params.yaml").write_text(text)
    assert len(unused_by_params()) == count


@pytest.mark.usefixtures("data")
def test_the_status_works_without_params_yaml() -> None:
    Path("params.yaml").unlink()
    assert unused_by_params() == []


def test_without_data_nothing_is_unused(in_tmp: Path) -> None:
    write_text(in_tmp / "params.yaml", "snapshot: {sources: {new: x}, benchmarks: {}}")
    assert unused_by_params() == unused_by_snapshot() == []
