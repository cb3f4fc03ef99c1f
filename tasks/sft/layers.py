"""Replace the norms and gates of a model by kernels in C (`tasks.sft.native`), for LoRA in bf16 on a CPU.

transformers computes each of them in several passes over memory. A layer is replaced if its code is that of
Llama's, as in most architectures, and its `forward` alone, so the hooks on the module still run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tasks.sft import native


def fuse_layers(model: torch.nn.Module) -> None:
    """Fuse the RMSNorms with frozen weights, and the gates of SwiGLU; other layers keep their forward."""
    for layer in model.modules():
        if is_norm(layer):
            layer.forward = partial(forward_norm, layer)
        elif is_gated(layer):
            layer.forward = partial(forward_gated, layer)


def is_norm(layer: Any) -> bool:
    """Return whether a layer is Llama's RMSNorm, with a weight that the kernel supports."""
    return (
        has_code(layer, LlamaRMSNorm)
        and not layer.weight.requires_grad
        and layer.weight.dtype == torch.bfloat16
        and len(layer.weight) % native.MULTIPLE_OF == 0
    )


def is_gated(layer: Any) -> bool:
    """Return whether a layer is Llama's MLP with SiLU."""
    return has_code(layer, LlamaMLP) and isinstance(layer.act_fn, SiLUActivation)


def has_code(layer: Any, kind: type) -> bool:
    """Return whether the forward of a layer's class has the code of another class."""
    ours, other = type(layer).forward, kind.forward  # type: ignore[attr-defined]
    names = ("co_code", "co_consts", "co_names")
    return isinstance(ours, FunctionType) and all(
        getattr(ours.__code__, name) == getattr(other.__code__, name) for name in names
    )


def forward_norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a norm that `is_norm`."""
    if x.dtype != torch.bfloat16:
        return plain_forward(layer, x)
    normed: torch.Tensor = native.Norm.apply(x, layer.weight, layer.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def forward_gated(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute an MLP that `is_gated`."""
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    if gate.dtype == up.dtype == torch.bfloat16:
        gated = native.SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    else:
        gated = layer.act_fn(gate) * up
    projected: torch.Tensor = layer.down_proj(gated)
    return projected


def plain_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a layer as transformers does."""
    found: torch.Tensor = type(layer).forward(layer, x)
    return found


def find_fused(model: torch.nn.Module) -> dict[torch.nn.Module, Any]:
    """Return the fused layers with their forward."""
    found = {layer: vars(layer).get("forward") for layer in model.modules()}
    return {layer: forward for layer, forward in found.items() if is_fused(forward)}


def is_fused(forward: Any) -> bool:
    """Return whether a forward is that of a fused layer."""
    return isinstance(forward, partial) and forward.func in (forward_norm, forward_gated)


@contextmanager
def unfused(model: torch.nn.Module) -> Iterator[None]:
    """Compute all layers as transformers does within the block."""
    fused = find_fused(model)
    for layer in fused:
        del layer.forward
    try:
        yield
    finally:
        for layer, forward in fused.items():
            layer.forward = forward
