"""A separate process detects the machine's capabilities; a kernel is trusted only after it ran."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from nightshift.core.errors import ConfigError
from tasks.sft import machine
from tasks.sft.attention import attend_per_example
from tasks.sft.machine import (
    choose_attention,
    choose_precision,
    find_missing,
    probe_in_subprocess,
    visible_devices,
)
from tasks.sft.probe import Probe
from tests.helpers.sft import sft_params

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without a GPU")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 32}
GEMMA2 = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 16,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
}


def attend(query: Any, key: Any, value: Any) -> tuple[Any, None]:
    """Attend causally over the whole row, ignoring example boundaries."""
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> Iterator[None]:
    """Register kernels with one fault each."""

    def leaking(_module: Any, query: Any, key: Any, value: Any, _mask: Any, **_: Any) -> Any:
        return attend(query, key, value)

    def with_one_dtype(_module: Any, query: Any, key: Any, value: Any, _mask: Any, **_: Any) -> Any:
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError("Query/Key/Value should either all have the same dtype")
        return attend(query, key, value)

    lengths: set[int] = set()

    def for_one_length(module: Any, query: Any, *more: Any, **rest: Any) -> Any:
        if torch.is_grad_enabled():
            lengths.add(query.shape[2])
        if len(lengths) > 1:
            raise RuntimeError("no kernel for dynamic shapes")
        return attend_per_example(module, query, *more, **rest)

    AttentionInterface.register("leaking", leaking)
    AttentionInterface.register("for_one_length", for_one_length)
    AttentionMaskInterface.register("for_one_length", sdpa_mask)
    AttentionInterface.register("with_one_dtype", with_one_dtype)
    yield
    for name in ("leaking", "for_one_length", "with_one_dtype"):
        del AttentionInterface._global_mapping[name]
    del AttentionMaskInterface._global_mapping["for_one_length"]


def try_kernel(
    name: str, config: dict[str, Any], precision: str = "fp32", longest: int = 100, **changes: Any
) -> str | None:
    return Probe(sft_params(**changes), "cpu", precision, config, longest).try_kernel(name)


def find_leak(name: str, config: dict[str, Any], longest: int = 100) -> str | None:
    return Probe(sft_params(), "cpu", "fp32", config, longest).find_leak(name)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, {**LLAMA, "head_dim": 24}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_kernel_that_computes_the_models_attention_passes(
    name: str, precision: str, config: dict[str, Any]
) -> None:
    assert try_kernel(name, config, precision) is None


def test_a_kernel_that_does_not_isolate_examples_fails() -> None:
    assert Probe(sft_params(), "cpu", "fp32", LLAMA, 100).find_leak("sdpa_per_example") is None
    message = find_leak("leaking", LLAMA)
    assert message is not None
    assert message.startswith("packed examples attend to each other")


def test_a_kernel_that_ignores_the_window_fails_if_an_example_exceeds_it() -> None:
    assert str(try_kernel("leaking", MISTRAL)).startswith("its result differs from eager attention")
    assert try_kernel("leaking", MISTRAL, longest=30) is None
    assert str(find_leak("leaking", MISTRAL, longest=30)).startswith("packed examples attend to each other")


def test_a_kernel_that_ignores_the_softcap_fails() -> None:
    assert try_kernel("eager", GEMMA2) is None
    assert str(try_kernel("leaking", GEMMA2)).startswith("its result differs from eager attention")


def test_a_kernel_does_not_replace_an_attention_that_is_not_transformers_own() -> None:
    bloom = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000}
    message = "this architecture has an attention of its own, which a kernel does not replace"
    assert try_kernel("leaking", bloom, "bf16") == message
    assert try_kernel("eager", bloom, "bf16") is None
    assert choose_attention("auto", "cpu", Probe(sft_params(), "cpu", "bf16", bloom, 100))[0] == "eager"


def test_a_kernel_is_tried_with_the_dtypes_of_training() -> None:
    """Autocast over full-precision weights yields queries and keys in full precision, values in half."""
    assert try_kernel("with_one_dtype", LLAMA, "bf16", strategy="ddp") is None
    full = try_kernel("with_one_dtype", LLAMA, "bf16", strategy="ddp", adapter=None)
    assert full == "ValueError: Query/Key/Value should either all have the same dtype"
    assert try_kernel("with_one_dtype", LLAMA, "bf16", strategy="zero2", adapter=None) is None
    assert try_kernel("sdpa", LLAMA, "bf16", strategy="ddp", adapter=None) is None


def test_a_kernel_that_trains_rows_of_only_one_length_fails() -> None:
    """flex_attention, compiled by torch 2.11 on a GPU, failed at the second length."""
    assert try_kernel("for_one_length", LLAMA) == "RuntimeError: no kernel for dynamic shapes"


def test_the_head_is_found_only_if_it_outputs_the_logits() -> None:
    assert Probe(sft_params(), "cpu", "fp32", LLAMA, 100).find_head() == "lm_head"
    scaled = {**LLAMA, "model_type": "cohere", "logit_scale": 0.0625}
    capped = {**GEMMA2, "final_logit_softcapping": 30.0}
    biased = {**LLAMA, "model_type": "phi"}
    for config in (scaled, capped, biased):
        assert Probe(sft_params(), "cpu", "fp32", config, 100).find_head() is None


def test_an_unknown_kernel_is_reported_with_its_error() -> None:
    assert "ValueError" in str(try_kernel("no_such_kernel", LLAMA))


def test_a_model_that_does_not_run_is_not_blamed_on_the_kernel() -> None:
    with pytest.raises(
        ConfigError, match=r"config\.json: a small model of this architecture does not run: ValueError"
    ):
        try_kernel("sdpa", {**LLAMA, "model_type": "no-such-model"})


@WITHOUT_GPU
def test_values_that_need_a_gpu_are_rejected_without_one() -> None:
    with pytest.raises(
        ConfigError, match=r"sft\.precision=tf32, but this machine's cpu does not support tf32"
    ):
        choose_precision("tf32", "cpu")
    with pytest.raises(ConfigError, match=r"sft\.attn_implementation=flash_attention_2 does not work"):
        choose_attention("flash_attention_2", "cpu", Probe(sft_params(), "cpu", "fp32", LLAMA, 100))


def test_all_missing_requirements_are_reported_at_once() -> None:
    params = sft_params(use_liger_kernel=True, optim="adamw_8bit")
    missing = find_missing(params, "cpu")
    assert [line.split(" needs ")[0] for line in missing] == [
        "sft.optim=adamw_8bit",
        "sft.use_liger_kernel=true",
    ]


@WITHOUT_GPU
def test_a_subprocess_probes_this_machine() -> None:
    found = probe_in_subprocess(sft_params(attn_implementation="auto"), LLAMA, 100)
    assert (found.device, found.devices, found.memory) == ("cpu", (), None)
    assert (found.precision, found.attention, found.head) == ("fp32", "sdpa_per_example", "lm_head")


@WITHOUT_GPU
def test_an_error_in_the_subprocess_is_raised_here() -> None:
    with pytest.raises(ConfigError, match="precision=tf32, but this machine's cpu does not support tf32"):
        probe_in_subprocess(sft_params(precision="tf32"), LLAMA, 100)


@pytest.mark.parametrize(
    ("visible", "count", "devices"),
    [
        (None, 2, ("0", "1")),
        ("3", 1, ("3",)),
        ("GPU-8932f937, 1", 2, ("GPU-8932f937", "1")),
        # CUDA stops at the first unknown device.
        ("1,99,0", 1, ("1",)),
        ("", 0, ()),
    ],
)
def test_the_visible_devices_keep_their_names(
    visible: str | None, count: int, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(count))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv(machine.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(machine.VISIBLE, visible)
    assert visible_devices() == devices
