"""Models are scored on as few GPUs as hold them, and on all GPUs at the same time."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightshift.core.errors import StageError
from tasks.evaluate import gpus
from tasks.evaluate.gpus import find_places, read_free, split_gpus


@given(st.lists(st.integers(1, 100), min_size=1, max_size=16), st.integers(1, 400))
def test_groups_share_no_gpu_and_each_holds_the_model_if_any_can(sizes: list[int], needed: int) -> None:
    free = {str(number): size for number, size in enumerate(sizes)}
    groups = split_gpus(free, needed)
    used = [name for group in groups for name in group]
    assert len(used) == len(set(used))
    if sum(sizes) >= needed:
        assert all(sum(free[name] for name in group) >= needed for group in groups)
        # One GPU less does not hold it.
        largest = sorted(sizes)[-len(groups[0]) + 1 :] if len(groups[0]) > 1 else []
        assert sum(largest) < needed
    else:
        assert used == sorted(free)


def test_the_largest_model_decides_and_the_names_are_those_of_cuda_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("base", "adapter", "other")]
    for folder, size in zip(folders, (90, 10, 50), strict=True):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * size)
        (folder / "training_args.bin").write_bytes(b"x" * 999)
    base, adapter, other = folders
    monkeypatch.setattr(gpus, "read_free", lambda: {"2": 130, "GPU-5": 119})
    models = [{base}, {base, adapter}, {other}]
    # 100 bytes of weights and their caches need 120.
    assert find_places(models) == [{"CUDA_VISIBLE_DEVICES": "2"}]
    assert find_places([{other}]) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "GPU-5"}]
    monkeypatch.setattr(gpus, "read_free", lambda: {"2": 80, "GPU-5": 80})
    assert find_places(models) == [{"CUDA_VISIBLE_DEVICES": "2,GPU-5"}]
    monkeypatch.setattr(gpus, "read_free", lambda: {"0": 40, "1": 40})
    with pytest.raises(StageError, match=r"GPUs 0, 1 have .* use evaluate.engine: endpoint"):
        find_places(models)


def test_a_machine_without_gpus_has_none_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read_free() == {}
