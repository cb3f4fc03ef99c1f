"""The trained model: omitting PEFT's input cast is bit-identical; a saved adapter is loaded whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.core.errors import StageError
from tasks.sft.model import load_adapter, load_model
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"lora_target_modules": ["q_proj", "down_proj"], "lora_layers_to_transform": [1]},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {"lora_modules_to_save": ["norm"]},
    ],
)
def test_a_saved_adapter_gives_another_one_its_weights(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    params = sft_params(strategy="single", num_processes=1, **changes)
    first, second = (load_model(str(tiny_base), params, "single", "fp32", "sdpa") for _ in range(2))
    with torch.no_grad():
        for weight in first.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    first.save_pretrained(tmp_path)
    load_adapter(second, tmp_path)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    assert [weight.requires_grad for weight in first.parameters()] == [
        weight.requires_grad for weight in second.parameters()
    ]


def test_an_adapter_with_other_modules_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    narrow, wide = (
        load_model(str(tiny_base), sft_params(lora_target_modules=targets), "single", "fp32", "sdpa")
        for targets in (["q_proj"], ["q_proj", "k_proj"])
    )
    narrow.save_pretrained(tmp_path)
    with pytest.raises(
        StageError, match=r"4 weights are not those of the adapter to train, such as .*k_proj"
    ):
        load_adapter(wide, tmp_path)
