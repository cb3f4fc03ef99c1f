"""Memory estimates: parameter counts of published models, and what each strategy shards."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nightshift.core.errors import ConfigError
from tasks.sft import native
from tasks.sft.fused import fuse_adapter
from tasks.sft.layers import fuse_layers
from tasks.sft.memory import Batch, Memory, _layer_bytes, estimate
from tasks.sft.model import adapt
from tasks.sft.shape import count_adapter, count_parameters, read_shape
from tasks.sft.strategy import GIB, ZERO, choose_strategy, keeps_half, uses_autocast
from tests.helpers.sft import sft_params

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
QWEN2_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
BATCH = Batch(tokens=1024, labelled=512)


def memory(config: dict[str, Any], strategy: str, device: str = "cuda", **changes: Any) -> Memory:
    params = sft_params(strategy="ddp", **{"num_processes": 4, "adapter": None, **changes})
    return estimate(config, params, strategy, "bf16", BATCH, device)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(SMOLLM2, 134_515_008), (LLAMA3_8B, 8_030_261_248), (QWEN2_HALF_B, 494_032_768)],
)
def test_parameter_counts_match_published_models(config: dict[str, Any], parameters: int) -> None:
    assert count_parameters(read_shape(config)) == parameters


def test_an_adapter_has_two_low_rank_matrices_per_target() -> None:
    shape = read_shape(SMOLLM2)
    assert count_adapter(shape, sft_params(lora_r=16)) == 4_884_480
    assert count_adapter(shape, sft_params(lora_r=8, lora_target_modules=["q_proj", "v_proj"])) == 460_800
    assert count_adapter(shape, sft_params(lora_r=16, use_dora=True)) == 5_040_000
    # Published for Llama 3 8B at rank 16 on all linear layers.
    assert count_adapter(read_shape(LLAMA3_8B), sft_params(lora_r=16)) == 41_943_040


def test_a_pattern_counts_the_layers_that_match_it() -> None:
    shape = read_shape(SMOLLM2)
    pattern = r"model\.layers\.\d+\.self_attn\.(q|v)_proj"
    assert count_adapter(shape, sft_params(lora_r=8, lora_target_modules=pattern)) == 460_800
    with pytest.raises(ConfigError, match="'q_proj' matches no linear layer; whole names are matched"):
        count_adapter(shape, sft_params(lora_target_modules="q_proj"))


def test_modules_trained_whole_are_counted_and_tied_ones_once() -> None:
    tied, apart = read_shape(SMOLLM2), read_shape({**SMOLLM2, "tie_word_embeddings": False})
    both = sft_params(lora_r=16, lora_modules_to_save=["embed_tokens", "lm_head"])
    assert count_adapter(tied, both) == 4_884_480 + 49_152 * 576
    assert count_adapter(apart, both) == 4_884_480 + 2 * 49_152 * 576
    with pytest.raises(ConfigError, match="lora_modules_to_save: wte: unknown; use q_proj"):
        count_adapter(tied, sft_params(lora_modules_to_save=["wte"]))


def test_an_unknown_target_module_is_reported() -> None:
    with pytest.raises(
        ConfigError, match="lora_target_modules: query: not a linear layer of a block; use q_proj"
    ):
        count_adapter(read_shape(SMOLLM2), sft_params(lora_target_modules=["query"]))


def test_a_model_of_another_architecture_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size is missing.*got model_type 'gpt2'"):
        read_shape({"model_type": "gpt2", "n_embd": 768})
    with pytest.raises(ConfigError, match="num_local_experts: a mixture of experts"):
        read_shape({**LLAMA3_8B, "num_local_experts": 8})


def test_full_fine_tuning_takes_16_bytes_per_parameter_and_zero_shards_them() -> None:
    whole = memory(LLAMA3_8B, "single", num_processes=1)
    assert whole.moment == "step"
    assert whole.weights == whole.gradients - 4 * 8_030_261_248 == 32_121_044_992
    assert whole.optimizer == 64_242_089_984
    # Half-precision weights; the full-precision copy and optimizer states, 12 bytes, are sharded by 4.
    stage1 = memory(LLAMA3_8B, "zero1")
    assert (stage1.weights, stage1.optimizer) == (16_060_522_496, 24_090_783_744)
    sizes = [memory(LLAMA3_8B, name).total for name in ("ddp", "zero1", "zero2", "zero3")]
    assert sizes == sorted(sizes, reverse=True)


def test_offloading_moves_the_optimizer_state_from_the_gpu_to_the_cpu() -> None:
    changes = {"strategy": "zero3", "offload_optimizer": "cpu"}
    params = sft_params(num_processes=4, adapter=None, **changes)
    assert estimate(LLAMA3_8B, params, "zero3", "bf16", BATCH, "cuda").optimizer == 0
    assert estimate(LLAMA3_8B, params, "zero3", "bf16", BATCH, "cpu").optimizer == 24_090_783_744


def test_checkpointing_keeps_only_the_input_of_each_layer() -> None:
    batch = Batch(tokens=8192, labelled=1)
    kept = [
        estimate(LLAMA3_8B, sft_params(activation_checkpointing=on), "ddp", "bf16", batch, "cuda").activations
        for on in (False, True)
    ]
    # Inputs: 32 layers x 8192 tokens x 4096 values of 2 bytes, plus one recomputed layer and the gradients
    # within its MLP.
    assert kept[1] == 32 * 8192 * 4096 * 2 + kept[0] // 32 + 8192 * 2 * (2 * 14336 + 4096)


@pytest.mark.parametrize(
    ("rows", "changes", "gib"),
    [
        (2, {"attn_implementation": "torch_varlen"}, 65.53),
        (2, {"attn_implementation": "sdpa_per_example"}, 64.53),
        (2, {"attn_implementation": "flex_attention"}, 62.53),
        (2, {"attn_implementation": "sdpa"}, 69.53),
        (2, {"attn_implementation": "sdpa_per_example", "use_liger_kernel": True}, 53.88),
        (4, {"attn_implementation": "sdpa_per_example", "activation_checkpointing": True}, 23.69),
    ],
)
def test_the_estimate_is_within_5_percent_of_an_8b_model_on_a_gpu(
    rows: int, changes: dict[str, Any], gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on an H200 with torch 2.11, rows of 4096 tokens, LoRA (benchmarks/results/gpu.json)."""
    monkeypatch.setattr("tasks.sft.memory.torch_version", lambda: (2, 11))
    batch = Batch(tokens=4096 * rows, labelled=4095 * rows)
    params = sft_params(num_processes=1, **changes)
    found = estimate(LLAMA3_8B, params, "single", "bf16", batch, "cuda")
    assert (found.total - found.overhead) / GIB == pytest.approx(gib, rel=0.05)


def test_auto_chooses_the_simplest_strategy_that_fits_and_gives_the_reason() -> None:
    params = sft_params(strategy="auto", num_processes=4)
    needs = {"ddp": 40 * GIB, "zero1": 30 * GIB, "zero2": 20 * GIB, "zero3": 10 * GIB}
    assert choose_strategy(params, needs, 80 * GIB) == (
        "ddp",
        "ddp: 40.0 GiB of 80.0 GiB; sharding would only slow it down",
    )
    assert choose_strategy(params, needs, 24 * GIB) == (
        "zero2",
        "zero2: 20.0 GiB of 24.0 GiB; zero1 takes 30.0 GiB of 24.0 GiB",
    )
    with pytest.raises(ConfigError, match=r"strategy=auto: zero3 takes 10.0 GiB of 8.0 GiB; set "):
        choose_strategy(params, needs, 8 * GIB)
    assert choose_strategy(params)[0] == choose_strategy(params, needs, None)[0] == "ddp"


SMALL = {
    **LLAMA3_8B,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_attention_heads": 8,
    "vocab_size": 64,
}
SMALL["num_key_value_heads"] = 2
TOKENS = 120


def saved_bytes_per_layer(
    strategy: str, precision: str, attention: str = "sdpa_per_example", *, fused: bool, **changes: Any
) -> int:
    """Return the bytes that autograd keeps per layer, without weights: three layers minus two."""
    params = sft_params(strategy=strategy, **changes)
    dtype = torch.bfloat16 if keeps_half(params, strategy, precision) else torch.float32
    found = []
    for layers in (2, 3):
        config = LlamaConfig(**{**SMALL, "num_hidden_layers": layers})
        model: Any = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
        if params.adapter:
            model = adapt(model, params, strategy, precision)
            model = model.to(dtype) if strategy in ZERO else model
            model.enable_input_require_grads()
        if fused:
            fuse_adapter(model)
        if attention == "avx512_per_example":
            fuse_layers(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        row = {"input_ids": torch.randint(64, (1, TOKENS)), "cu_seq_lens_q": torch.tensor([0, TOKENS])}
        autocast = uses_autocast(strategy, precision)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
        ):
            _outputs = model(**row, use_cache=False)
        # Autocast's copies of weights have no token dimension.
        of_tokens = [t for key, t in kept.items() if key not in weights and TOKENS in t.shape]
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in of_tokens))
    return found[1] - found[0]


@pytest.mark.parametrize(
    ("strategy", "precision", "changes"),
    [
        ("ddp", "bf16", {}),
        ("zero2", "bf16", {}),
        ("ddp", "fp32", {}),
        ("ddp", "bf16", {"lora_dropout": 0.1}),
        ("ddp", "bf16", {"adapter": None}),
        ("zero2", "bf16", {"adapter": None}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_estimated_activations_match_what_autograd_saves(
    strategy: str, precision: str, changes: dict[str, Any], *, fused: bool
) -> None:
    params = sft_params(strategy=strategy, attn_implementation="sdpa_per_example", **changes)
    counted = TOKENS * _layer_bytes(read_shape(SMALL), params, strategy, precision, TOKENS)
    assert saved_bytes_per_layer(strategy, precision, fused=fused, **changes) == pytest.approx(
        counted, rel=0.05
    )


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_estimated_activations_match_what_the_kernels_in_c_save(
    strategy: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_tmp
    monkeypatch.setattr(native, "cpu_flags", lambda: {native.NEEDS})
    native.load_kernels.cache_clear()
    params = sft_params(strategy=strategy, attn_implementation="avx512_per_example")
    counted = TOKENS * _layer_bytes(read_shape(SMALL), params, strategy, "bf16", TOKENS)
    found = saved_bytes_per_layer(strategy, "bf16", "avx512_per_example", fused=True)
    native.load_kernels.cache_clear()
    assert found == pytest.approx(counted, rel=0.05)
