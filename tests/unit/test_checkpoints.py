"""Only a checkpoint that verifies is resumed."""

from pathlib import Path

from tasks.sft import checkpoints


def make(folder: Path, step: int) -> Path:
    written = folder / checkpoints.SAVING / f"checkpoint-{step}"
    (written / "rank").mkdir(parents=True)
    (written / "rank" / "state.pt").write_bytes(b"x" * step)
    return checkpoints.close(written, folder)


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    assert checkpoints.find_newest(tmp_path) == newest


def test_a_damaged_incomplete_or_open_checkpoint_is_passed_over(tmp_path: Path) -> None:
    good = make(tmp_path, 1)
    (make(tmp_path, 2) / "rank" / "state.pt").write_bytes(b"xy")
    (make(tmp_path, 3) / "rank" / "state.pt").unlink()
    (make(tmp_path, 4) / checkpoints.MANIFEST).unlink()
    assert checkpoints.find_newest(tmp_path) == good


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoints.find_newest(tmp_path) is None


def test_a_checkpoint_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    (tmp_path / checkpoints.SAVING / "checkpoint-5").mkdir(parents=True)
    assert checkpoints.find_newest(tmp_path) is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 20):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, 2, best=4)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-4",
    ]
