"""A leak between examples lies far above rounding: both are measured, and leaks are planted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import read_json, read_rows, write_json, write_rows
from nightshift.core.paths import BASE, PACKED
from tasks.pack import ROWS
from tasks.sft import SftParams, proof, selftest
from tasks.sft import __main__ as stage
from tasks.sft.machine import probe_machine
from tasks.sft.rows import read_sizes
from tasks.sft.selftest import bound
from tasks.sft.worker import build_trainer
from tests.helpers.architectures import make_architecture
from tests.helpers.cells import write_inputs
from tests.helpers.sft import WHOLE_SET, shipped_params

Rows = tuple[tuple[int, ...], ...]
Batch = dict[str, Any]


@pytest.fixture
def make(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """Return a function that builds job and trainer of a small model."""
    monkeypatch.setattr(stage, "probe_in_subprocess", probe_machine)
    monkeypatch.setattr("tasks.sft.machine.cpu_has_bf16", lambda: True)

    def build(
        name: str, rows: Rows = ((0, 1), (2, 3)), config: Any = None, **changes: Any
    ) -> tuple[Any, Any]:
        base = make_architecture(name, in_tmp / "base")
        write_json(base / "config.json", read_json(base / "config.json") | (config or {}))
        write_inputs(in_tmp, base, rows)
        options = {"attn_implementation": "auto", "per_device_train_batch_size": 1, **changes}
        params = SftParams(**{**shipped_params(), **WHOLE_SET, **options})
        sizes = read_sizes(PACKED)
        job = stage.build_job(params, sizes)
        stage.prepare_rows(job, sizes)
        set_seed(0)
        return job, build_trainer(job, [])

    return build


def measure(trainer: Any, job: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Run the isolation check, and return the largest distance and the bound, both relative to the leak."""
    seen: list[Any] = []
    check = selftest.check_isolation

    def note(found: Any, noise: float, leak: float, precision: str) -> Any:
        limit = bound(max(noise, selftest.KERNEL_NOISE[precision]), leak)
        seen.append((max(found.values()) / leak, limit / leak))
        return check(found, noise, leak, precision)

    monkeypatch.setattr(selftest, "check_isolation", note)
    try:
        proof.run_checks(trainer, job)
    finally:
        monkeypatch.setattr(selftest, "check_isolation", check)
        measured: tuple[float, float] = seen[0]
        trainer.last = measured
    return measured


def change_batches(trainer: Any, change: Callable[[Batch], None]) -> None:
    """Apply a change to every batch."""
    collate = trainer.data_collator

    def changed(rows: Any) -> Batch:
        batch: Batch = collate(rows)
        change(batch)
        return batch

    trainer.data_collator = changed


def drop_boundaries(batch: Batch) -> None:
    """Let the examples of a row attend to each other."""
    for key in (*proof.BOUNDARIES, "position_ids", "seq_idx"):
        del batch[key]


def move_boundary(batch: Batch) -> None:
    """Give the first token of the second example to the first."""
    ends = batch["cu_seq_lens_q"].clone()
    ends[1] += 1
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends
    batch["max_length_q"] = batch["max_length_k"] = int(ends.diff().max())
    batch["position_ids"] = torch.cat([torch.arange(n) for n in ends.diff().tolist()])[None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral"])
def test_rounding_lies_far_below_the_bound_and_a_leak_far_above(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    job, trainer = make(name, precision=precision)
    found, limit = measure(trainer, job, monkeypatch)
    # In half precision rounding sends single tokens to other experts.
    assert found < limit / (10 if precision == "fp32" else 1.5)
    change_batches(trainer, drop_boundaries)
    with pytest.raises(StageError, match="packed examples attend to each other"):
        measure(trainer, job, monkeypatch)
    assert trainer.last[0] > 3 * limit


def test_a_boundary_that_is_one_token_off_is_a_leak(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, trainer = make("llama")
    change_batches(trainer, move_boundary)
    with pytest.raises(StageError, match="packed examples attend to each other"):
        measure(trainer, job, monkeypatch)
    assert trainer.last[0] > 10 * trainer.last[1]


def test_padded_examples_that_share_a_row_are_a_leak(make: Callable[..., Any]) -> None:
    """This was the fault of `packing: false` with a micro-batch of two: it joined what cannot be joined."""
    job, trainer = make("falcon", rows=((0,), (1,), (2,)), per_device_train_batch_size=2)
    assert job.backend.batches == "padded"
    proof.run_checks(trainer, job)
    trainer.data_collator.padding_free = True
    job = job.model_copy(update={"backend": replace(job.backend, batches="flattened")})
    with pytest.raises(StageError, match="packed examples attend to each other"):
        proof.run_checks(trainer, job)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_router_loss_is_that_of_transformers(make: Callable[..., Any], name: str) -> None:
    config = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    _, trainer = make(name, rows=((0,),), config=config, adapter=None, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager")
    (row,) = read_rows(PACKED)
    given = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
    expected = model(**given).loss.item()
    model.config.output_router_logits = False
    assert expected > model(**given).loss.item() + 0.1
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.model.config.output_router_logits
    assert trainer.model.config.router_aux_loss_coef == 0.5


def test_all_names_must_match_and_all_that_do_not_are_reported(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make("llama", lora_target_modules=["q_proj", "v_porj", "k_prj"], lora_modules_to_save=["head"])
    message = str(caught.value)
    assert "sft.lora_target_modules: v_porj: no such module in the base; did you mean v_proj?" in message
    assert "sft.lora_target_modules: k_prj: no such module in the base; did you mean k_proj?" in message
    assert "sft.lora_modules_to_save: head: no such module in the base" in message


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma2", {"lora_target_modules": ["q_proj", "embed_tokens"]}, "the base ties embeddings and head"),
        ("llama", {"lora_target_modules": ["lm_head"]}, "TRL trains no adapter on the head"),
        ("mixtral", {"lora_dropout": 0.1}, "PEFT cannot add this adapter: .* lora_dropout"),
        ("mixtral", {"use_dora": True}, "PEFT cannot add this adapter: .* use_dora"),
    ],
)
def test_an_adapter_that_cannot_be_trained_is_refused(
    make: Callable[..., Any], name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make(name, **changes)


def test_an_adapter_on_free_embeddings_trains(make: Callable[..., Any]) -> None:
    job, trainer = make("llama", lora_target_modules=["embed_tokens"])
    found = proof.run_checks(trainer, job)
    assert (found["gradients"]["weights_reached"], found["gradients"]["weights"]) == (2, 2)


def test_tokens_without_an_embedding_are_refused(in_tmp: Path, make: Callable[..., Any]) -> None:
    base = make_architecture("llama", in_tmp / "base")
    write_inputs(in_tmp, base, ((0, 1),))
    rows = read_rows(PACKED)
    rows[0]["input_ids"][3] = 264
    write_rows(PACKED, rows, ROWS)
    params = SftParams(**{**shipped_params(), **WHOLE_SET})
    message = r"token 264, but the base has embeddings for 264 tokens; .* base\.added_tokens"
    with pytest.raises(ConfigError, match=message):
        stage.build_job(params, read_sizes(PACKED))


def test_effective_values_cover_the_section_and_count_what_trains(make: Callable[..., Any]) -> None:
    from tasks.sft.effective import effective

    job, trainer = make("llama", lora_target_modules=["q_proj", "v_proj"], lora_r=4, optim="adafactor")
    found = effective(trainer, job)
    assert found.keys() >= SftParams.model_fields.keys()
    # Rank 4 on (32 -> 32) and (32 -> 16), in two layers.
    assert found["trained"] == {"weights": 896, "tensors": 8, "modules": {"q_proj": 2, "v_proj": 2}}
    assert found["adam_beta1"] == {"requested": 0.9, "effective": None}
    assert found["batches"]["effective"] == "flattened"


def test_a_model_that_mixes_a_padded_batch_is_scored_one_by_one(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tasks.evaluate.model import Model, load_model

    base = make_architecture("llama", in_tmp / "base")
    loaded, tokenizer = load_model(str(base), None), AutoTokenizer.from_pretrained(base)
    assert Model(loaded, tokenizer, batch_size=4).batch_size == 4
    assert "in a batch than alone" not in caplog.text
    forward = loaded.forward
    # Without the mask, a prompt attends to its padding.
    monkeypatch.setattr(loaded, "forward", lambda *ids, attention_mask=None, **more: forward(*ids, **more))
    assert Model(loaded, tokenizer, batch_size=4).batch_size == 1
    assert "other results in a batch than alone; scoring one by one" in caplog.text
