"""The row counts of the ledger balance, within a stage and between stages."""

from pathlib import Path

import pytest

from nightshift.core.errors import StageError
from nightshift.core.files import read_json, write_json
from nightshift.core.stage import write_summary
from nightshift.pipeline.ledger import check_ledger

SUMMARIES = {
    "ingest": {"rows_out": 10},
    "dedupe": {"rows_in": 10, "rows_out": 8},
    "split": {"rows_in": 8, "rows_out_by_side": {"train": 6}},
    "augment": {"rows_in": 6, "rows_out": 9},
    "decontaminate": {"rows_in": 9, "rows_out": 9},
    "pack": {"rows_in": 9, "packed_rows": 2},
    "sft": {"rows_in": 2},
}


def test_a_stage_that_loses_a_row_without_a_reason_fails(in_tmp: Path) -> None:
    write_summary("dedupe", rows_in=3, rows_out=2, dropped={"exact_duplicate": 1, "other": 0})
    assert read_json(in_tmp / "data/dedupe/summary.json") == {
        "rows_in": 3,
        "added": 0,
        "rows_out": 2,
        "dropped": {"exact_duplicate": 1},
    }
    with pytest.raises(StageError, match="3 in \\+ 0 added != 2 out"):
        write_summary("dedupe", rows_in=3, rows_out=2)


def test_a_row_that_disappears_between_two_stages_is_detected(tmp_path: Path) -> None:
    for stage, summary in SUMMARIES.items():
        write_json(tmp_path / stage / "summary.json", summary)
    check_ledger(tmp_path)
    write_json(tmp_path / "augment" / "summary.json", {"rows_in": 5, "rows_out": 9})
    with pytest.raises(StageError, match=r"augment\.rows_in=5, but split\.rows_out_by_side\.train=6"):
        check_ledger(tmp_path)
