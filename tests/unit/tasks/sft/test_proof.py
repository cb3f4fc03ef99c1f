"""The device on which the self-test loads the saved model a second time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks.sft.proof import find_reload_device
from tasks.sft.strategy import GIB

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def trainer(device: torch.device, *, use_liger_kernel: bool) -> Any:
    """Return a trainer of a model with 4 GiB of weights, which take no memory here."""
    model = torch.nn.Linear(2**20, 2**10, bias=False, device="meta")
    return SimpleNamespace(
        args=SimpleNamespace(device=device),
        model=model,
        params=SimpleNamespace(use_liger_kernel=use_liger_kernel),
    )


@pytest.mark.parametrize(
    ("free", "use_liger_kernel", "expected"),
    [(6 * GIB, False, GPU), (6 * GIB, True, GPU), (6 * GIB - 1, False, CPU), (6 * GIB - 1, True, None)],
)
def test_a_second_model_is_loaded_where_it_fits(
    *, free: int, use_liger_kernel: bool, expected: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may leave too little GPU memory for it, and Liger's kernels run on no CPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    assert find_reload_device(trainer(GPU, use_liger_kernel=use_liger_kernel)) == expected


def test_without_a_gpu_it_is_loaded_on_the_cpu() -> None:
    assert find_reload_device(trainer(CPU, use_liger_kernel=False)) == CPU
