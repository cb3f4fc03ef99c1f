"""Why a training stopped decides what the next attempt does."""

from pathlib import Path

import pytest

from tasks.errors import StageError, TrainingError
from tasks.sft.failures import HANG, Attempt, clear, read_attempt, settle, write_failure


def test_out_of_memory_halves_the_micro_batch_until_one_row_is_left(tmp_path: Path) -> None:
    write_failure(tmp_path, "out_of_memory", "out of memory: 2 GiB")
    error = settle(tmp_path, 4, 1)
    assert isinstance(error, TrainingError)
    assert (error.kind, error.exit_code) == ("out_of_memory", 10)
    assert "takes 2 rows at a time, not 4" in str(error)
    assert read_attempt(tmp_path) == Attempt(halvings=1)
    assert "takes 1 rows at a time, not 2" in str(settle(tmp_path, 4, 1))
    last = settle(tmp_path, 4, 1)
    assert last.exit_code == 2
    assert "one row does not fit" in str(last)


def test_rows_of_a_bad_loss_are_left_out_once(tmp_path: Path) -> None:
    write_failure(tmp_path, "loss", "loss nan at step 7, rows [3]", (7,))
    error = settle(tmp_path, 1, 1)
    assert error.exit_code == 11
    following = read_attempt(tmp_path)
    assert following == Attempt(skipped=(7,))
    again = settle(tmp_path, 1, 1)
    assert (again.exit_code, type(again)) == (2, StageError)


def test_a_hang_is_tried_again_once(tmp_path: Path) -> None:
    (tmp_path / HANG.format(rank=0)).write_text("")
    (tmp_path / HANG.format(rank=1)).write_text("Timeout!")
    error = settle(tmp_path, 1, 1)
    assert error.exit_code == 12
    assert "hang-1.txt" in str(error)
    assert settle(tmp_path, 1, 1).exit_code == 2


def test_the_first_rank_to_fail_is_heard(tmp_path: Path) -> None:
    write_failure(tmp_path, "preempted", "asked to end; saved at step 3")
    write_failure(tmp_path, "error", "the other rank is gone")
    assert "asked to end" in str(settle(tmp_path, 1, 143))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("failure")] == ["failure.json"]
    clear(tmp_path)
    assert "ended with code 137" in str(settle(tmp_path, 1, 137))


@pytest.mark.parametrize("kind", ["out_of_memory", "loss", "hang", "preempted"])
def test_every_kind_has_a_code_of_its_own(kind: str) -> None:
    codes = [TrainingError(k, "").exit_code for k in TrainingError.EXIT_CODES]
    assert len(set(codes)) == 4
    assert TrainingError(kind, "").exit_code not in (0, 1, 2)  # type: ignore[arg-type]
