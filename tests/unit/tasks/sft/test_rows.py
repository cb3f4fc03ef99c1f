"""Rows for the ranks: sizes, the mapped file, and its order."""

from pathlib import Path

import pytest

from benchmarks.rows import bytes_per_token, write_files
from nightshift.core.files import write_batches
from tasks.sft.plan import FILLER
from tasks.sft.rows import (
    SCHEMA,
    as_batches,
    iterate_row_groups,
    map_rows,
    planned_rows,
    read_sizes,
    write_mapped,
)

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [1, 2]},
    {"input_ids": [900], "labels": [-100], "seq_lengths": [1]},
    {"input_ids": [8, 9, 10, 11], "labels": [-100, -100, -100, 11], "seq_lengths": [4]},
]
FILLER_ROW = {"input_ids": [2, 2], "labels": [-100, -100], "seq_lengths": [2]}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Return a Parquet file with a row group of two rows and one of one."""
    path = tmp_path / "packed.parquet"
    batches = [batch for part in (ROWS[:2], ROWS[2:]) for batch in as_batches(part)]
    write_batches(path, batches, SCHEMA)
    return path


def test_sizes_count_over_all_row_groups(packed: Path) -> None:
    sizes = read_sizes(packed)
    assert sizes.lengths == [[1, 2], [1], [4]]
    assert sizes.labelled == [2, 0, 1]
    assert sizes.tokens == [3, 1, 4]
    assert sizes.largest_token == 900


def test_mapped_rows_are_those_of_the_file_in_the_order_of_the_plan(packed: Path) -> None:
    file = packed.with_name("rows.arrow")
    write_mapped(file, iterate_row_groups(packed))
    assert list(map_rows(file)) == ROWS
    planned = planned_rows(file, [2, 0, FILLER, 2], FILLER_ROW)
    assert list(planned) == [ROWS[2], ROWS[0], FILLER_ROW, ROWS[2]]
    assert planned.cache_files == [{"filename": str(file)}]


def test_a_rank_holds_no_rows_in_memory_of_its_own(tmp_path: Path) -> None:
    """As Python lists, a token takes more than 200 bytes in each rank."""
    write_files(tmp_path, rows=2000, length=1024)
    assert bytes_per_token("mapped", tmp_path, 2000 * 1024) < 8
