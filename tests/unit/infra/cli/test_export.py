"""What an export refuses and which files it leaves."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infra.cli import export
from nightshift.core.errors import GateError, StageError
from nightshift.registry.served_model import PROBES

FAILING = "#!/bin/sh\necho unknown architecture >&2\nexit 3\n"


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), export.atomic_directory(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with export.atomic_directory(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_nan_logits_are_rejected(lively: tuple[Any, Any]) -> None:
    model, tokenizer = deepcopy(lively)
    answers = [export.answer(model, tokenizer, question) for question in PROBES]
    assert export.compare("itself", model, answers, 1e-6) == {"largest": 0.0, "bound": 1e-6}
    model.get_output_embeddings().weight.data[0, 0] = math.nan
    with pytest.raises(GateError, match="export: it: logits differ by up to nan"):
        export.compare("it", model, answers, 1e-6)


def test_nan_logits_of_any_probe_are_rejected(lively: tuple[Any, Any]) -> None:
    model, tokenizer = lively
    answers = [export.answer(model, tokenizer, question) for question in PROBES]
    ids, logits = answers[-1]
    answers[-1] = ids, torch.full_like(logits, math.nan)
    with pytest.raises(GateError, match="export: it: logits differ by up to nan"):
        export.compare("it", model, answers, 1e-6)


def test_non_finite_weights_are_not_exported(tmp_path: Path) -> None:
    save_file({"used": torch.ones(2)}, tmp_path / "a.safetensors")
    export.require_finite(tmp_path, "do not use this version")
    # No probe uses the row of this token, so no answer would reveal it.
    save_file({"embed": torch.tensor([1.0, math.inf])}, tmp_path / "b.safetensors")
    with pytest.raises(GateError, match="export: embed is not finite; nothing was written; do not use"):
        export.require_finite(tmp_path, "do not use this version")


def test_a_different_answer_of_the_merged_model_is_rejected(lively: tuple[Any, Any]) -> None:
    model, tokenizer = deepcopy(lively)
    answers = [export.answer(model, tokenizer, question) for question in PROBES]
    export.require_same_answers(model, tokenizer, answers)
    model.model.layers[1].mlp.down_proj.weight.data.neg_()
    with pytest.raises(GateError, match="export: 0 of 3 greedy answers of the merged model are those of"):
        export.require_same_answers(model, tokenizer, answers)


def test_stored_weights_are_judged_by_their_logits_only(lively: tuple[Any, Any]) -> None:
    """Rounding may flip a near-tie, so another token may follow although the logits are within the bound."""
    model, tokenizer = lively
    ids, logits = export.answer(model, tokenizer, PROBES[0])
    noise = 0.01 * logits.std() * torch.ones_like(logits)
    assert export.compare("it", model, [(ids, logits + noise)], 0.02)["largest"] == pytest.approx(0.01)
    with pytest.raises(GateError, match=r"export: it: logits differ by up to 0\.01 of their standard"):
        export.compare("it", model, [(ids, logits + noise)], 0.005)


def test_a_missing_converter_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "tools_environment", lambda: {"PATH": ""})
    with pytest.raises(StageError, match=r"convert_hf_to_gguf\.py, convert-hf-to-gguf is on PATH; clone"):
        export.find_converter()


def test_a_failed_converter_is_an_error_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "convert-hf-to-gguf"
    script.write_text(FAILING)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command: list[Any] = export.find_converter()
    assert command == [str(script)]
    with pytest.raises(StageError, match="convert-hf-to-gguf failed: unknown architecture"):
        export.write_gguf(command, tmp_path, "f32")
