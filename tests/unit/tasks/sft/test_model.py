"""The trained model: omitting PEFT's input cast gives bit-identical results."""

from pathlib import Path

import torch

from tasks.sft.model import load_model
from tests.helpers.sft import sft_params


def test_an_adapter_without_the_input_cast_computes_the_same(tiny_base: Path) -> None:
    torch.manual_seed(0)
    model = load_model(
        str(tiny_base), sft_params(strategy="single", num_processes=1), "single", "bf16", "sdpa"
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    layers = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert len(layers) == 14
    ids = torch.arange(100, 140)[None]
    found = []
    for cast in (False, True):
        assert all(layer.cast_input_dtype_enabled is False for layer in layers) is not cast
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss, [w.grad for w in model.parameters() if w.grad is not None]))
        for layer in layers:
            layer.cast_input_dtype_enabled = True
    (loss, gradients), (expected, expected_gradients) = found
    assert torch.equal(loss, expected)
    assert len(gradients) == 28
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
