"""Matrix products with frozen weights in float8, at twice the rate of bf16 on an H100.

Every row of every factor has a separate scale, which maps its largest value to float8's largest. A
token's result therefore does not depend on neighboring tokens, and packed examples stay isolated.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import ScalingType, scaled_mm
from transformers import TrainerCallback

from nightshift.core.errors import StageError
from tasks.sft.fused import fused_layers, project

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
# The kernels require dimensions that are multiples of this.
MULTIPLE_OF = 16


class Float8Weight:
    """A frozen weight in float8, stored once per direction: in total as many bytes as in bf16."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Quantize a weight.

        Args:
            weight: Frozen weight, shape (outputs, inputs), both multiples of 16.
        """
        self.rows = quantize(weight)
        self.columns = quantize(weight.t())

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x W' in bf16, shape (n, outputs); x has shape (n, inputs)."""
        return multiply(x, *self.rows)

    def pull_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Compute g W in bf16, shape (n, inputs); g has shape (n, outputs)."""
        return multiply(gradient, *self.columns)


def multiply(x: torch.Tensor, other: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply x of shape (n, k) by the transpose of a quantized factor of shape (m, k)."""
    rows, row_scales = quantize(x)
    return scaled_mm(
        rows,
        other.t(),
        row_scales,
        ScalingType.RowWise,
        scales.t(),
        ScalingType.RowWise,
        output_dtype=torch.bfloat16,
        # Accumulates in fewer bits; the error is far below the rounding of the factors.
        use_fast_accum=x.is_cuda,
    )


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of x in float8, shape (n, k), and their scales, shape (n, 1) in float32."""
    # No gradient flows through this; the compiled function would be compiled again for tensors with one.
    x = x.detach()
    # Uncompiled, this would cost a GPU as much time as the product saves.
    return _quantize_compiled(x) if x.is_cuda else _quantize(x)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / FLOAT8_MAX
    return (x.float() / scales).to(FLOAT8).contiguous(), scales


_quantize_compiled = torch.compile(_quantize, dynamic=True)


def quantize_base(model: torch.nn.Module) -> int:
    """Quantize the frozen weights of the fused adapter layers to float8; return their number.

    Raises:
        StageError: No layer has dimensions that the kernels accept.
    """
    changed = 0
    for layer in fused_layers(model):
        base: Any = layer.base_layer
        if any(size % MULTIPLE_OF for size in base.weight.shape):
            continue
        base.float8 = Float8Weight(base.weight.detach().to(torch.bfloat16))
        # Used while the adapter is disabled; no gradient flows through it.
        base.forward = partial(forward_base, base)
        base.weight.data = base.weight.data.new_empty(0)
        changed += 1
    if not changed:
        raise StageError(
            f"params.yaml: sft.fp8_base=true, but no layer with an adapter has dimensions that are multiples "
            f"of {MULTIPLE_OF}; set it to false"
        )
    return changed


def forward_base(base: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a frozen layer without its adapter, shape (..., outputs)."""
    return project(x.reshape(-1, x.shape[-1]), base.float8, base.bias).view(*x.shape[:-1], -1)


class QuantizeBase(TrainerCallback):
    """Quantize the base once it is on its device; DeepSpeed would cast back an earlier result."""

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, model: Any, **_: Any) -> None:
        """Quantize the base."""
        quantize_base(model)
