"""Only a checkpoint that verifies is resumed."""

from pathlib import Path

from tasks.sft import checkpoints


def make(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "rank").mkdir(parents=True)
    (path / "rank" / "state.pt").write_bytes(b"x" * step)
    checkpoints.close(path)
    return path


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
