"""The self-tests before step 1 refuse a model that would silently train wrong; each fault is planted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.core.errors import StageError
from nightshift.core.files import read_json
from tasks.sft import native
from tasks.sft.layers import find_fused
from tasks.sft.proof import Proof
from tasks.sft.trainer import Trainer


def selftest_file(trainer: Trainer) -> Path:
    return Path(trainer.args.output_dir) / "output" / "selftest.json"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": None, "learning_rate": 1e-4},
        {"use_dora": True},
        {"precision": "bf16"},
        {"precision": "bf16", "attn_implementation": "auto"},
        # An effect below the rounding of bf16 was taken for a lost adapter.
        {"precision": "bf16", "lora_r": 1, "lora_alpha": 1, "use_dora": True},
        {"activation_checkpointing": True},
    ],
)
def test_a_correct_model_passes_and_trains(
    build: Callable[..., Trainer], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without bf16 instructions torch emulates them; users get an error, since that is too slow.
    monkeypatch.setattr("tasks.sft.machine.cpu_has_bf16", lambda: True)
    trainer = build(**changes)
    trainer.train()
    assert trainer.state.global_step == 3
    proof = read_json(selftest_file(trainer))
    assert proof["isolation"]["moved"] == 0.0
    assert proof["isolation"]["proven"]
    assert proof["gradients"]["relative_difference"] < (0.1 if "precision" in changes else 1e-5)
    assert proof["saving"]["proven"]


def test_a_quantized_base_passes_and_trains(build: Callable[..., Trainer]) -> None:
    trainer = build(adapter="qlora")
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds
    # TRL rounds them to bfloat16.
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert last < first
    proof = read_json(selftest_file(trainer))
    assert proof["isolation"]["moved"] == 0.0
    assert proof["isolation"]["proven"]
    # A and B for each of seven matrices in two layers.
    assert proof["saving"] == {"weights": 28}


def test_whole_modules_train_beside_a_quantized_base_in_full_precision(build: Callable[..., Trainer]) -> None:
    """TRL's rounding left a head in bfloat16 behind hidden states in float32: an unknown error."""
    trainer = build(adapter="qlora", lora_modules_to_save=["embed_tokens", "lm_head"])
    trainer.train()
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert last < first


def test_a_float8_base_passes_and_trains(
    build: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.sft.machine.cpu_has_bf16", lambda: True)
    trainer = build(fp8_base=True, precision="bf16")
    trainer.train()
    assert sum(hasattr(module, "float8") for module in trainer.model.modules()) == 14
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert last < first
    proof = read_json(selftest_file(trainer))
    assert proof["isolation"]["moved"] == 0.0
    assert proof["isolation"]["proven"]
    assert 0 < proof["gradients"]["relative_difference"] < 0.1
    assert proof["saving"] == {"weights": 28}


def test_a_base_that_is_not_in_float8_as_requested_is_caught(
    build: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.sft.machine.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("tasks.sft.float8.quantize_base", lambda _: 0)
    require_refusal(build(fp8_base=True, precision="bf16"), "fp8_base=True was requested")


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (native.Attention, lambda ctx, _: (*map(torch.ones_like, ctx.saved_tensors[:3]), None, None)),
        (native.Norm, lambda _, grad: (grad, None, None)),
        (native.SwiGLU, lambda _, grad: (grad, grad)),
    ],
)
def test_a_kernel_in_c_with_wrong_gradients_is_caught(
    build: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    function: type,
    wrong: Callable[..., Any],
) -> None:
    monkeypatch.setattr("tasks.sft.machine.cpu_has_bf16", lambda: True)
    monkeypatch.setattr(native, "cpu_flags", lambda: {native.NEEDS})
    native.load_kernels.cache_clear()
    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    trainer = build(precision="bf16", attn_implementation="auto")
    assert len(find_fused(trainer.model)) == 7
    require_refusal(trainer, "the gradient of a batch differs from that of its examples")
    native.load_kernels.cache_clear()


def test_the_selftest_changes_neither_weights_nor_random_state(build: Callable[..., Trainer]) -> None:
    digests = []
    for runs_selftest in (True, False):
        trainer = build(lora_dropout=0.1)
        if not runs_selftest:
            trainer.remove_callback(Proof)
        trainer.train()
        weights = [p.detach().sum().item() for p in trainer.model.parameters() if p.requires_grad]
        digests.append(weights)
    assert digests[0] == digests[1]


def require_refusal(trainer: Trainer, message: str) -> None:
    """Require that training refuses to start before any weight has changed."""
    with pytest.raises(StageError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not selftest_file(trainer).exists()


def change_batches(trainer: Trainer, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply a change to every batch."""
    collate = trainer.data_collator

    def changed(rows: Any) -> dict[str, Any]:
        batch: dict[str, Any] = collate(rows)
        change(batch)
        return batch

    trainer.data_collator = changed


def test_an_attention_mask_of_ones_is_caught(build: Callable[..., Trainer]) -> None:
    trainer = build()
    change_batches(trainer, lambda b: b.update(attention_mask=torch.ones_like(b["input_ids"])))
    require_refusal(trainer, "packed examples attend to each other")


def test_positions_that_do_not_restart_are_caught(build: Callable[..., Trainer]) -> None:
    trainer = build()
    change_batches(trainer, lambda b: b.update(position_ids=torch.arange(b["input_ids"].shape[1])[None]))
    require_refusal(trainer, "packed examples attend to each other")


def test_an_enabled_kv_cache_is_caught(build: Callable[..., Trainer]) -> None:
    trainer = build()
    inner = trainer.model.forward
    trainer.model.forward = lambda *args, **more: inner(*args, **{**more, "use_cache": True})
    require_refusal(trainer, "packed examples attend to each other")


def test_missing_activation_checkpointing_is_caught(build: Callable[..., Trainer]) -> None:
    trainer = build(activation_checkpointing=True)
    trainer.model.activation_checkpointing_enable = lambda **_: None
    require_refusal(trainer, "activation_checkpointing=True was requested")


def test_frozen_adapters_are_caught(build: Callable[..., Trainer]) -> None:
    trainer = build()
    trainer.model.requires_grad_(requires_grad=False)
    require_refusal(trainer, "gradients reach 0 of 0 trainable weights")


def test_rows_without_a_label_are_caught(build: Callable[..., Trainer]) -> None:
    trainer = build()
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    require_refusal(trainer, "no row has a label")


def test_a_loss_that_is_a_mean_over_examples_is_caught(build: Callable[..., Trainer]) -> None:
    trainer = build()
    change_batches(trainer, lambda b: b["labels"].__setitem__((0, slice(-4, None)), -100))
    require_refusal(trainer, "differs from that of its examples")


@pytest.mark.parametrize("fault", ["nothing is written", "zeros are written"])
def test_a_save_that_loses_the_adapter_is_caught(build: Callable[..., Trainer], fault: str) -> None:
    from safetensors.torch import load_file, save_file

    trainer = build()
    save = trainer.save_model

    def lossy(folder: str, **more: Any) -> None:
        save(folder, **more)
        file = Path(folder) / "adapter_model.safetensors"
        weights = load_file(file)
        kept = {} if fault == "nothing is written" else {k: torch.zeros_like(v) for k, v in weights.items()}
        save_file(kept, file)

    trainer.save_model = lossy
    require_refusal(trainer, "the saved weights differ from the trained ones")
