"""Float8 products with frozen weights: close to bf16, independent per row, never skipped silently."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nightshift.core.errors import ConfigError, StageError
from tasks.sft.float8 import FLOAT8, Float8Weight, quantize, quantize_base
from tasks.sft.fused import fuse_adapter
from tasks.sft.machine import require_float8
from tests.unit.tasks.sft.test_fused import (
    adapted,
    convert_to_half,
    gradient_error,
    largest_error,
    llama,
    loss_and_gradients,
    qwen,
    row,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@given(exponent=st.integers(-20, 20), at=st.integers(0, 31))
def test_each_row_keeps_three_mantissa_bits_at_any_scale(exponent: int, at: int) -> None:
    x = torch.randn(4, 32)
    x[1] *= 2.0**exponent
    x[2] = 0
    x[3, at] = 3e4
    values, scales = quantize(x)
    assert (values.dtype, scales.shape) == (FLOAT8, (4, 1))
    found = values.float() * scales
    # Half a step of three mantissa bits, and below the smallest normal number half of its step.
    bound = torch.maximum(x.abs() * 2**-4, scales * 2**-10)
    assert ((found - x).abs() <= bound * 1.001).all()


def test_quantizing_is_never_part_of_the_graph() -> None:
    """The compiled function would be compiled again for tensors with a gradient, up to a limit of eight."""
    values, scales = quantize(torch.randn(4, 32, requires_grad=True))
    assert not scales.requires_grad
    assert not values.requires_grad


def test_both_products_match_bf16_up_to_rounding() -> None:
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    # Outputs and inputs of very different magnitude, for which one scale would not suffice.
    weight *= torch.logspace(-3, 3, 32)[:, None].bfloat16()
    gradient = torch.randn(48, 32).bfloat16()
    found = Float8Weight(weight)
    assert largest_error([found.project(x).float()], [x.float() @ weight.float().t()]) < 0.05
    assert largest_error([found.pull_back(gradient).float()], [gradient.float() @ weight.float()]) < 0.05
    assert (found.project(x).dtype, found.pull_back(gradient).shape) == (torch.bfloat16, (48, 64))


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    weight, x = Float8Weight(torch.randn(32, 64).bfloat16()), torch.randn(48, 64).bfloat16()
    before = weight.project(x)
    x[0] = 1e4
    assert torch.equal(weight.project(x)[1:], before[1:])
    assert not torch.equal(weight.project(x)[0], before[0])


def half(model: Any) -> Any:
    """Convert a model to half precision, and fuse its adapter."""
    convert_to_half(model)
    fuse_adapter(model)
    return model


@pytest.mark.parametrize("make", [llama, qwen])
def test_an_adapted_model_is_close_to_bf16(make: Any) -> None:
    model, inputs = half(adapted(make())), row()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, **inputs)
        assert quantize_base(model) == 14
        found = loss_and_gradients(model, **inputs)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.01)
    assert 0 < gradient_error(found, expected) < 0.2


def test_with_the_adapter_disabled_the_model_is_the_quantized_base() -> None:
    model, inputs = half(adapted(qwen())), row()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        expected = model(inputs).logits
        quantize_base(model)
        found = model(inputs).logits
    assert 0 < largest_error([found.float()], [expected.float()]) < 0.2


def test_the_bf16_weights_are_freed() -> None:
    model = half(adapted(llama()))
    quantize_base(model)
    frozen = sum(w.numel() for n, w in model.named_parameters() if "proj" in n and "lora" not in n)
    assert frozen == 0


def test_layers_with_unsupported_dimensions_stay_unchanged() -> None:
    model = half(adapted(llama()))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.base_layer = torch.nn.Linear(64, 120, bias=False)
    assert quantize_base(model) == 13
    assert not hasattr(layer.base_layer, "float8")


def test_a_model_without_a_supported_layer_is_reported() -> None:
    with pytest.raises(StageError, match="fp8_base=true, but no layer with an adapter has dimensions"):
        quantize_base(adapted(llama()))


def test_an_unsupported_machine_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    require_float8("bf16", "cpu")
    with pytest.raises(ConfigError, match="fp8_base=true does not work on this machine: precision is fp32"):
        require_float8("fp32", "cpu")

    def old(*_: Any, **__: Any) -> None:
        raise RuntimeError("requires compute capability 8.9\nat line 3")

    monkeypatch.setattr("tasks.sft.float8.scaled_mm", old)
    with pytest.raises(ConfigError, match=r"RuntimeError: requires compute capability 8\.9; set it to false"):
        require_float8("bf16", "cpu")
