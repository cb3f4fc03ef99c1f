"""The self-test on the trainer: boundaries from positions, and the device of the second model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks.sft.proof import find_reload_device, without_boundaries
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


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("sdpa_per_example", {}),
        (
            "flash_attention_4",
            {"cu_seq_lens_q": [0, 3, 5], "cu_seq_lens_k": [0, 3, 5], "max_length_q": 3, "max_length_k": 3},
        ),
    ],
)
def test_a_check_uses_positions_instead_of_boundaries(kernel: str, expected: dict[str, Any]) -> None:
    """FlashAttention 4 needs boundaries, and refuses a tensor as length, which transformers would give it."""
    config = SimpleNamespace(_attn_implementation=kernel)
    fake: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    # The boundaries claim one example, the positions two.
    one = torch.tensor([0, 5], dtype=torch.int32)
    batch = {
        "input_ids": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        **{"cu_seq_lens_q": one, "cu_seq_lens_k": one, "max_length_q": 5, "max_length_k": 5},
    }
    given = without_boundaries(fake, batch)
    assert given.keys() == {"input_ids", "position_ids", *expected}
    found = {key: given[key].tolist() if key.startswith("cu_seq") else given[key] for key in expected}
    assert found == expected
    assert all(type(value) is int for key, value in found.items() if key.startswith("max_length"))
