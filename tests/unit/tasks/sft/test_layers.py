"""Norms and gates in C are as accurate as those of transformers, and replace only what they compute."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tasks.sft import native
from tasks.sft.layers import find_fused, fuse_layers, unfused

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let any CPU compile the kernels; without AVX-512 BF16 they compute the same, slowly."""
    monkeypatch.setattr(native, "cpu_flags", lambda: {native.NEEDS})
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    native.load_kernels.cache_clear()
    torch.manual_seed(0)
    yield
    native.load_kernels.cache_clear()


def frozen(model: Any) -> Any:
    for weight in model.parameters():
        # New norms multiply by 1.
        weight.data += torch.randn_like(weight) / 4 if weight.dim() == 1 else 0
    return model.requires_grad_(requires_grad=False).to(torch.bfloat16)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def compute(layer: Callable[..., torch.Tensor], *inputs: torch.Tensor, dtype: torch.dtype) -> list[Any]:
    """Return the output of a layer, and the gradients of its inputs."""
    leaves = [one.to(dtype, copy=True).requires_grad_() for one in inputs]
    output = layer(*leaves)
    pulled = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, leaves, pulled.to(dtype))]


@pytest.mark.parametrize("width", [16, 576])
def test_the_norm_is_as_accurate_as_that_of_transformers(width: int) -> None:
    weight = (1 + torch.randn(width) / 4).bfloat16()
    layer = LlamaRMSNorm(width).requires_grad_(requires_grad=False)
    layer.weight.data = weight
    x = torch.randn(3, 7, width).bfloat16()

    def exact_norm(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    exact = compute(exact_norm, x, dtype=torch.float64)
    ours = compute(lambda x: native.Norm.apply(x, weight, 1e-6), x, dtype=torch.bfloat16)
    theirs = compute(layer, x, dtype=torch.bfloat16)
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        assert 0 < error(found, truth) < min(2e-3, 1.05 * error(other, truth))


def test_the_gate_is_as_accurate_as_that_of_transformers() -> None:
    gate, up = (3 * torch.randn(5, 33).bfloat16() for _ in range(2))
    gate[0, :3] = torch.tensor([-200.0, 200.0, 0.0])

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    exact = compute(plain, gate, up, dtype=torch.float64)
    ours = compute(native.SwiGLU.apply, gate, up, dtype=torch.bfloat16)
    theirs = compute(plain, gate, up, dtype=torch.bfloat16)
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        assert 0 < error(found, truth) < min(2e-3, 1.05 * error(other, truth))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        # Two norms and a gate in each of two layers, and the last norm; Qwen3 also norms queries and keys.
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), 7),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)), 11),
        # Its norm adds 1 to the weight, and its gate is a GELU.
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE)), 0),
        (lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_act": "gelu"})), 5),
    ],
    ids=["llama", "qwen3", "gemma2", "llama with gelu"],
)
def test_only_layers_with_the_code_of_llama_are_replaced(make: Callable[[], Any], count: int) -> None:
    model, ids = frozen(make()), torch.arange(40)[None]
    expected = model(ids).logits
    fuse_layers(model)
    assert len(find_fused(model)) == count
    logits = model(ids).logits
    assert torch.equal(logits, expected) == (count == 0)
    assert error(logits, expected.double()) < 2e-2
    with unfused(model):
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, logits)


def test_norms_that_train_and_layers_in_full_precision_stay() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    fuse_layers(model)
    assert len(find_fused(model)) == 2
    full, ids = LlamaForCausalLM(LlamaConfig(**SHAPE)), torch.arange(40)[None]
    expected = full(ids).logits
    fuse_layers(full)
    assert torch.equal(full(ids).logits, expected)
