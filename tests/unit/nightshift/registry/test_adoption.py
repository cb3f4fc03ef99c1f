"""A model from elsewhere: only weights and settings are taken, and they must fit the base."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nightshift.core.errors import DataError
from nightshift.registry.adoption import copy_model, require_fit


def make_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    config = AutoConfig.from_pretrained(base, **changes)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder)
    return folder


def make_full(base: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [make_adapter, make_full])
def test_weights_and_settings_are_taken_and_nothing_else(tmp_path: Path, tiny_base: Path, make: Any) -> None:
    source = make(tiny_base, tmp_path / "source")
    for name in ("optimizer.pt", "modeling.py", "tokenizer.json", "README.md"):
        (source / name).write_text("x")
    copy_model(source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    expected = (
        {"adapter_config.json", "adapter_model.safetensors"}
        if make is make_adapter
        else {"config.json", "generation_config.json", "model.safetensors"}
    )
    assert names == expected
    with warnings.catch_warnings():
        # One for each weight, once.
        warnings.filterwarnings("error", message=".*meta parameter.*no-op")
        require_fit(tmp_path / "target", tiny_base)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains neither adapter_config\.json nor config\.json"):
        copy_model(tmp_path, tmp_path / "target")


@pytest.mark.parametrize("make", [make_adapter, make_full])
def test_pickled_weights_are_refused(tmp_path: Path, tiny_base: Path, make: Any) -> None:
    source = make(tiny_base, tmp_path / "source")
    for path in source.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(DataError, match="contains no weights in safetensors format"):
        copy_model(source, tmp_path / "target")


def test_code_of_the_model_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    source = make_full(tiny_base, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(DataError, match=r"config\.json: `auto_map` loads code"):
        copy_model(source, tmp_path / "target")


def test_an_adapter_of_another_base_does_not_fit(tmp_path: Path, tiny_base: Path) -> None:
    wider = make_adapter(tiny_base, tmp_path / "wider", intermediate_size=96)
    with pytest.raises(DataError, match=r"does not load on the base: .*size mismatch for .*mlp"):
        require_fit(wider, tiny_base)
    deeper = make_adapter(tiny_base, tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(DataError, match=r"weights do not fit the base, first: .*layers\.2.*expected none"):
        require_fit(deeper, tiny_base)


def test_weights_that_are_missing_are_found(tmp_path: Path, tiny_base: Path) -> None:
    full = make_full(tiny_base, tmp_path / "full")
    weights = load_file(full / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, full / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights do not fit the base, first: .*down_proj\.weight missing"):
        require_fit(full, tiny_base)
