"""Weights that must not be rounded keep the precision that the checkpoint has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nightshift.registry.rounding import stored_dtypes
from tasks.base import load, save
from tests.helpers.architectures import make_architecture


def saved_again(name: str, folder: Path, half: bool, kept: tuple[str, ...]) -> dict[str, torch.Tensor]:  # noqa: FBT001
    """Import a checkpoint in bfloat16, and return the stored weights; `kept` of it is in float32."""
    source = make_architecture(name, folder / "source")
    file = source / "model.safetensors"
    weights = {key: value + 1 / 3000 for key, value in load_file(file).items()}
    if half:
        weights = {key: v if key.endswith(kept) else v.bfloat16() for key, v in weights.items()}
    save_file(weights, file, {"format": "pt"})
    model, tokenizer = load(str(source))
    save(model, tokenizer, "bfloat16", folder / "base", stored_dtypes(source))
    stored = load_file(folder / "base" / "model.safetensors")
    for key, value in stored.items():
        if value.dtype == torch.float32:
            assert torch.equal(value, weights[key])
    return stored


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    ("name", "kept"),
    [("deepseek_v3", ("e_score_correction_bias",)), ("mamba", (".A_log", ".D"))],
)
def test_routers_and_states_are_not_rounded(
    tmp_path: Path,
    name: str,
    kept: tuple[str, ...],
    half: bool,  # noqa: FBT001
) -> None:
    stored = saved_again(name, tmp_path, half, kept)
    full = {key for key, value in stored.items() if value.dtype == torch.float32}
    assert full == {key for key in stored if key.endswith(kept)}
    assert full


def test_what_a_checkpoint_in_half_precision_has_in_float32_stays(tmp_path: Path) -> None:
    stored = saved_again("llama", tmp_path, half=True, kept=("norm.weight",))
    assert {key for key, v in stored.items() if v.dtype == torch.float32} == {
        key for key in stored if key.endswith("norm.weight")
    }


def test_a_checkpoint_in_float32_is_rounded_as_requested(tmp_path: Path) -> None:
    stored = saved_again("llama", tmp_path, half=False, kept=())
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
