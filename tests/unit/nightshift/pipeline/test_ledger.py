"""The row counts of the ledger balance, within a stage and between stages."""

from pathlib import Path

import pytest

from nightshift.core.errors import StageError
from nightshift.core.files import read_json, write_json
from nightshift.core.stage import write_summary
from nightshift.pipeline.ledger import TRANSFERS, check_ledger


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
    rows = {"rows_in": 6, "rows_out": 6, "packed_rows": 6, "rows_out_by_side": {"train": 6}}
    for stage in {stage for sides in TRANSFERS for stage, *_ in sides}:
        write_json(tmp_path / stage / "summary.json", rows)
    check_ledger(tmp_path)
    write_json(tmp_path / "augment" / "summary.json", {"rows_in": 5, "rows_out": 6})
    with pytest.raises(StageError, match=r"augment\.rows_in=5, but split\.rows_out_by_side\.train=6"):
        check_ledger(tmp_path)
