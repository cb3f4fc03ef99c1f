"""Training resumes only from a checkpoint that passes verification."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nightshift.core.errors import StageError
from tasks.sft import checkpoints


def make(folder: Path, step: int) -> Path:
    written = folder / checkpoints.SAVING / f"checkpoint-{step}"
    (written / "rank").mkdir(parents=True)
    (written / "rank" / "state.pt").write_bytes(b"x" * step)
    return checkpoints.finalize(written, folder)


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    assert checkpoints.find_newest(tmp_path) == newest


def test_a_damaged_or_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    good = make(tmp_path, 1)
    (make(tmp_path, 2) / "rank" / "state.pt").write_bytes(b"xy")
    (make(tmp_path, 3) / "rank" / "state.pt").unlink()
    (make(tmp_path, 4) / checkpoints.MANIFEST).unlink()
    assert checkpoints.find_newest(tmp_path) == good


def test_any_damaged_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    good = make(tmp_path, 1)
    newest = make(tmp_path, 2)
    for file in (newest / checkpoints.MANIFEST, newest / "rank" / "state.pt"):
        whole = file.read_bytes()
        for position in range(len(whole)):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
            assert checkpoints.find_newest(tmp_path) == good, (file.name, position)
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            # Without its last line break, the manifest says the same.
            if file.name != checkpoints.MANIFEST or length < len(whole) - 1:
                assert checkpoints.find_newest(tmp_path) == good, (file.name, length)
        file.write_bytes(whole)
    assert checkpoints.find_newest(tmp_path) == newest


def test_without_checkpoints_the_newest_is_none(tmp_path: Path) -> None:
    assert checkpoints.find_newest(tmp_path) is None


def test_a_checkpoint_that_is_being_written_is_ignored(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_found_in_any_tensor(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    whole = {"a": torch.full((3, 4), 60_000.0, dtype=dtype), "none": torch.zeros(0), "ids": torch.arange(3)}
    save_file(whole, tmp_path / "model-1.safetensors")
    assert checkpoints.find_non_finite(tmp_path) is None
    checkpoints.require_finite(tmp_path)
    broken = torch.zeros(5, dtype=dtype)
    broken[2] = value
    save_file({"a.lora_A.weight": whole["a"], "a.lora_B.weight": broken}, tmp_path / "model-2.safetensors")
    with pytest.raises(StageError, match=r"a\.lora_B\.weight is not finite, so this model must not be used"):
        checkpoints.require_finite(tmp_path)


def test_a_checkpoint_with_non_finite_weights_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make(tmp_path, 1)
    written = tmp_path / checkpoints.SAVING / "checkpoint-2"
    written.mkdir(parents=True)
    save_file({"lora_B": torch.tensor([0.0, float("nan")])}, written / "adapter_model.safetensors")
    checkpoints.finalize(written, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.find_newest(tmp_path) == good
    assert "checkpoint-2: lora_B is not finite; trying the previous one" in caplog.text
