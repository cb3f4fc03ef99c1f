"""What the machine cannot do is told before anything runs; a kernel is trusted only after it ran."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tasks.errors import ConfigError
from tasks.sft.backend import choose_attention, choose_backend, choose_precision, find_missing
from tasks.sft.probe import probe_attention
from tests.sft import sft_params

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")


@WITHOUT_GPU
def test_what_needs_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(ConfigError, match=r"sft\.precision=tf32, but this machine's cpu has no tf32"):
        choose_precision("tf32", "cpu")
    with pytest.raises(ConfigError, match=r"sft\.attn_implementation=flash_attention_2 does not work"):
        choose_attention("flash_attention_2", "cpu", "fp32")


def test_all_that_is_missing_is_told_at_once() -> None:
    params = sft_params(use_liger_kernel=True, optim="adamw_8bit")
    told = find_missing(params, "cpu")
    assert [line.split(" needs ")[0] for line in told] == [
        "sft.optim=adamw_8bit",
        "sft.use_liger_kernel=true",
    ]


@WITHOUT_GPU
def test_auto_takes_what_runs_here() -> None:
    backend = choose_backend(sft_params(strategy="auto", precision="auto"))
    assert (backend.device, backend.attention, backend.strategy) == ("cpu", "sdpa", "ddp")
    assert backend.reason == "2 processes, each with the whole model"
    assert choose_backend(sft_params(strategy="auto", num_processes=1)).strategy == "single"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_kernel_that_isolates_passes_the_probe(name: str) -> None:
    assert probe_attention(name, "cpu", "fp32") is None


def test_a_kernel_that_does_not_isolate_fails_the_probe() -> None:
    def leaking(module: Any, query: Any, key: Any, value: Any, _mask: Any, **_: Any) -> tuple[Any, None]:
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("leaking", leaking)
    told = probe_attention("leaking", "cpu", "fp32")
    assert told is not None
    assert told.startswith("packed examples see each other")


def test_an_unknown_kernel_is_told_by_its_own_message() -> None:
    assert "ValueError" in str(probe_attention("no_such_kernel", "cpu", "fp32"))
