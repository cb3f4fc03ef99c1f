"""The proofs before step 1 refuse a model that would train wrong without an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tasks.errors import StageError
from tasks.sft import selftest

FIRST = 5


@pytest.fixture
def model(tiny_base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two examples of 5 and 6 tokens in one row, as TRL's collator hands them to the model."""
    ids = list(range(100, 111))
    row = {"input_ids": ids, "labels": [-100, *ids[1:5], -100, *ids[6:]], "seq_lengths": [FIRST, 6]}
    batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    return batch


def test_a_right_model_passes(model: Any, batch: dict[str, Any]) -> None:
    proof = selftest.run(model, batch, FIRST)
    assert proof["isolation"] == {"max_logit_difference": 0.0, "proven": True}
    assert proof["gradients"]["weights_reached"] == 14
    assert all(p.grad is None for p in model.parameters())


def test_an_attention_mask_of_ones_is_caught(model: Any, batch: dict[str, Any]) -> None:
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(StageError, match="packed examples see each other"):
        selftest.run(model, batch, FIRST)


def test_positions_that_do_not_restart_are_caught(model: Any, batch: dict[str, Any]) -> None:
    batch["position_ids"] = torch.arange(11)[None]
    with pytest.raises(StageError, match="packed examples see each other"):
        selftest.run(model, batch, FIRST)


def test_frozen_adapters_are_caught(model: Any, batch: dict[str, Any]) -> None:
    model.requires_grad_(requires_grad=False)
    with pytest.raises(StageError, match="gradients reach 0 weights"):
        selftest.run(model, batch, FIRST)


def test_a_row_without_a_label_is_caught(model: Any, batch: dict[str, Any]) -> None:
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(StageError, match="loss of the first row is nan"):
        selftest.run(model, batch, FIRST)
