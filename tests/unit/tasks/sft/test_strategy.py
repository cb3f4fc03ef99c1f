"""The generated DeepSpeed config."""

from typing import Any

import pytest

from tasks.sft.strategy import deepspeed_config
from tests.helpers.sft import sft_params


def zero(device: str, strategy: str = "zero3", **changes: Any) -> dict[str, Any]:
    params = sft_params(strategy=strategy, **changes)
    config = deepspeed_config(params, strategy, "bf16", 1, device)
    assert config
    section: dict[str, Any] = config["zero_optimization"]
    return section


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3"])
def test_the_gradient_bucket_is_no_larger_than_needed(strategy: str) -> None:
    """DeepSpeed allocates the bucket upfront: a gigabyte of bf16 by default."""
    assert zero("cuda", strategy)["reduce_bucket_size"] == 50_000_000


def test_offloaded_memory_is_pinned_on_a_gpu() -> None:
    changes = {"offload_optimizer": "cpu", "offload_param": "nvme", "nvme_path": "/fast"}
    assert zero("cuda", **changes)["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero("cuda", **changes)["offload_param"] == {
        "device": "nvme",
        "pin_memory": True,
        "nvme_path": "/fast",
    }
    assert zero("cpu", **changes)["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "offload_optimizer" not in zero("cuda")
