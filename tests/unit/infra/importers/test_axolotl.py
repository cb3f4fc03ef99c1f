"""Axolotl configs become params.yaml: expected values are literals, no key is lost silently."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from infra.importers.axolotl.memory import MEMORY_KEYS
from typer.testing import CliRunner

from infra.cli.app import app
from infra.importers.axolotl import GROUPS, convert, keys, translate, values_of
from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError
from tasks.check import section_schemas
from tasks.sft import SftParams
from tests.helpers.checkouts import ROOT

# Based on Axolotl's examples/llama-3/lora-1b.yml.
LORA = """
base_model: NousResearch/Llama-3.2-1B
revision_of_model: 2f7c4f8bc10f4a3fd5d3d5c0f3d0f7b4b52c1a3e
hub_model_id: someone/llama-lora
load_in_8bit: false
load_in_4bit: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    revision: 00112233445566778899aabbccddeeff00112233
    split: train
  - path: data/chats.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
wandb_project: llama
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
loss_watchdog_threshold: 5.0
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rms_norm: true
"""

# Based on Axolotl's examples/llama-3/qlora-fsdp-70b.yaml.
QLORA_FSDP = """
base_model: ./models/llama-3-70b
load_in_4bit: true
strict: false
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
val_set_size: 0.05
adapter: qlora
sequence_len: 512
sample_packing: false
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: constant_with_warmup
learning_rate: 0.00001
train_on_inputs: false
group_by_length: false
bf16: true
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
local_rank:
xformers_attention:
flash_attention: true
warmup_steps: 10
fsdp: [full_shard, auto_wrap]
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_offload_params: true
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_sharding_strategy: FULL_SHARD
"""

# A config file in the format of 2023.
OLD = """
base_model: ./llama-7b
base_model_config: ./llama-7b
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer
datasets:
  - path: data/vicuna.json
    type: sharegpt:chat
  - path: oasst/prompts
    type: input_output
sequence_len: 2048
max_packed_sequence_len: 2048
micro_batch_size: 4
batch_size: 32
num_epochs: 3
optimizer: adamw_hf
lr_scheduler: constant
learning_rate: 2.0e-5
warmup_steps: 100
noisy_embedding_alpha: 5
bf16: false
fp16: false
tf32: true
sdp_attention: true
evaluation_strategy: no
save_steps: 200
early_stopping_patience:
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_params.json
rl: dpo
"""


@pytest.fixture
def checkout(in_tmp: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp / name)
    return in_tmp


def translated(text: str) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the values set, and the notes by key of unneeded keys and of unmapped keys."""
    found = translate(yaml.safe_load(text), Path())
    notes = {
        kind: {one.key: one.note for one in found if one.kind == kind} for kind in ("not_needed", "unmapped")
    }
    return values_of(found), notes["not_needed"], notes["unmapped"]


def test_a_lora_file_is_mapped() -> None:
    values, not_needed, unmapped = translated(LORA)
    assert values == {
        "base.model": "hub:NousResearch/Llama-3.2-1B@2f7c4f8bc10f4a3fd5d3d5c0f3d0f7b4b52c1a3e",
        "snapshot.sources": {
            "gpt4_llm_cleaned": (
                "hub:teknium/GPT4-LLM-Cleaned@00112233445566778899aabbccddeeff00112233/*train*"
            ),
            "chats": "data/chats.jsonl",
        },
        "split.by_phrasing": [],
        "augment.sources": [],
        "split.validation_share": 0.1,
        "pack.max_length": 2048,
        "pack.packing": True,
        "pack.over_length": "drop",
        "sft.strategy": "auto",
        "sft.offload_optimizer": "none",
        "sft.offload_param": "none",
        "sft.per_device_train_batch_size": 2,
        "sft.gradient_accumulation_steps": 2,
        "sft.num_train_epochs": 1,
        "sft.max_steps": None,
        "sft.learning_rate": 0.0002,
        "sft.lr_scheduler_type": "cosine",
        "sft.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "sft.warmup_steps": 0,
        "sft.warmup_ratio": 0.1,
        "sft.optim": "adamw_8bit",
        "sft.adam_beta1": 0.9,
        "sft.adam_beta2": 0.999,
        "sft.adam_epsilon": 1e-8,
        "sft.weight_decay": 0.0,
        "sft.max_grad_norm": 1.0,
        "sft.label_smoothing_factor": 0.0,
        "sft.neftune_noise_alpha": None,
        "sft.precision": "auto",
        "sft.attn_implementation": "flash_attention_2",
        "sft.activation_checkpointing": True,
        "sft.use_reentrant": False,
        "sft.use_liger_kernel": True,
        "sft.torch_compile": False,
        "sft.adapter": "lora",
        "sft.lora_r": 16,
        "sft.lora_alpha": 32,
        "sft.lora_dropout": 0.05,
        "sft.lora_target_modules": [
            *("gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"),
        ],
        "sft.use_dora": False,
        "sft.use_rslora": False,
        "sft.loraplus_lr_ratio": None,
        "sft.eval_packing": True,
        "sft.early_stopping_patience": None,
        "sft.load_best_model_at_end": False,
        "sft.logging_steps": 1,
    }
    assert list(unmapped) == [
        *("evals_per_epoch", "saves_per_epoch", "hub_model_id", "loss_watchdog_threshold"),
    ]
    assert "run `dvc repro pack` and divide packed_rows" in unmapped["evals_per_epoch"]
    for key in ("output_dir", "wandb_project", "tf32", "liger_rms_norm", "special_tokens.pad_token"):
        assert key in not_needed
    assert "datasets[1].message_property_mappings" in not_needed
    assert not_needed["lora_model_dir, wandb_entity, resume_from_checkpoint"].startswith("empty")


def test_a_qlora_fsdp_file_is_mapped() -> None:
    values, not_needed, unmapped = translated(QLORA_FSDP)
    expected = {
        "base.model": "./models/llama-3-70b",
        "pack.packing": False,
        "sft.strategy": "fsdp2",
        "sft.offload_param": "cpu",
        "sft.offload_optimizer": "none",
        "sft.adapter": "qlora",
        "sft.lora_target_modules": "all-linear",
        "sft.gradient_accumulation_steps": 4,
        "sft.num_train_epochs": 4,
        "sft.learning_rate": 1e-5,
        "sft.lr_scheduler_type": "constant",
        "sft.lr_scheduler_kwargs": {},
        "sft.warmup_steps": 10,
        "sft.warmup_ratio": 0.0,
        "sft.precision": "bf16",
        "sft.attn_implementation": "flash_attention_2",
        # Axolotl sets reentrant, which gives no gradients with an adapter here; both are equivalent.
        "sft.use_reentrant": False,
    }
    assert {key: values.get(key) for key in expected} == expected
    assert "snapshot.sources" not in values
    assert "no commit is given" in unmapped["datasets[0]"]
    assert list(unmapped) == ["datasets[0]", "datasets"]
    assert not_needed["group_by_length"].startswith("rows are packed to equal length")
    assert not_needed["fsdp_config.transformer_layer_cls_to_wrap"] == "set automatically"


def test_an_old_file_is_mapped() -> None:
    values, not_needed, unmapped = translated(OLD)
    expected = {
        "snapshot.sources": {"vicuna": "data/vicuna.json"},
        "sft.per_device_train_batch_size": 4,
        "sft.gradient_accumulation_steps": 8,
        "sft.num_train_epochs": 3,
        "sft.optim": "adamw_torch",
        "sft.lr_scheduler_type": "constant",
        # transformers' constant schedule has no warmup.
        "sft.warmup_steps": 0,
        "sft.warmup_ratio": 0.0,
        "sft.neftune_noise_alpha": 5.0,
        "sft.precision": "tf32",
        "sft.attn_implementation": "sdpa",
        "sft.eval_steps": None,
        "sft.save_steps": 200,
        "sft.strategy": "zero3",
        "sft.offload_optimizer": "none",
        "sft.offload_param": "cpu",
        # Without an adapter key, Axolotl trains all weights.
        "sft.adapter": None,
    }
    assert {key: values.get(key, "missing") for key in expected} == expected
    assert sorted(unmapped) == ["datasets[1].type", "max_packed_sequence_len", "rl"]
    assert {"warmup_steps", "base_model_config", "model_type", "fp16"} <= not_needed.keys()


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("learning_rate: 1e-4", "sft.learning_rate", 0.0001),
        ("bf16: full", "sft.precision", "bf16"),
        ("fp16: true", "sft.precision", "fp16"),
        ("{bf16: false, fp16: false}", "sft.precision", "fp32"),
        ("sdp_attention: true", "sft.attn_implementation", "sdpa"),
        ("flex_attention: true", "sft.attn_implementation", "flex_attention"),
        ("eager_attention: true", "sft.attn_implementation", "eager"),
        ("xformers_attention: true", "sft.attn_implementation", "xformers"),
        ("optimizer: adamw_bnb_8bit", "sft.optim", "adamw_8bit"),
        ("optimizer: paged_adamw_8bit", "sft.optim", "paged_adamw_8bit"),
        ("optimizer: schedule_free_adamw", "sft.optim", "schedule_free_adamw"),
        ("excess_length_strategy: raise", "pack.over_length", "error"),
        ("deepspeed: deepspeed_configs/zero1.json", "sft.strategy", "zero1"),
        ("deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json", "sft.offload_optimizer", "cpu"),
        ("deepspeed: deepspeed_configs/zero2_torch_compile.json", "sft.torch_compile", True),
        ("deepspeed: {zero_optimization: {stage: 2}}", "sft.strategy", "zero2"),
        ("{fsdp_version: 2, fsdp_config: {offload_params: false}}", "sft.strategy", "fsdp2"),
        ("fsdp_config: {activation_checkpointing: true}", "sft.activation_checkpointing", True),
        ("{adapter: lora, load_in_4bit: true}", "sft.adapter", "qlora"),
        ("{adapter: lora, loraplus_lr_ratio: 16}", "sft.loraplus_lr_ratio", 16.0),
        ("{adapter: lora, peft_use_dora: true}", "sft.use_dora", True),
        ("torch_compile: auto", "sft.torch_compile", True),
        ("gradient_checkpointing: offload", "sft.activation_checkpointing", True),
        ("evals_per_epoch: 0", "sft.eval_steps", None),
        ("neftune_noise_alpha: 0", "sft.neftune_noise_alpha", None),
        ("{lr_scheduler: one_cycle, warmup_ratio: 0.2}", "sft.lr_scheduler_kwargs", {"pct_start": 0.2}),
        ("{lr_scheduler: reduce_lr_on_plateau}", "sft.lr_scheduler_kwargs", {"patience": 10}),
        (
            "{lr_scheduler: cosine_with_min_lr, learning_rate: 2e-4, lr_scheduler_kwargs: {min_lr: 2e-5}}",
            "sft.lr_scheduler_kwargs",
            {"min_lr_rate": pytest.approx(0.1)},
        ),
        (
            "{lr_scheduler: warmup_stable_decay, "
            "lr_scheduler_kwargs: {num_decay_steps: 9, min_lr_ratio: 0.1}}",
            "sft.lr_scheduler_kwargs",
            {"num_decay_steps": 9, "min_lr_rate": 0.1},
        ),
    ],
)
def test_a_key_is_mapped(text: str, target: str, value: Any) -> None:
    assert translated(text)[0].get(target, "missing") == value


@pytest.mark.parametrize(
    ("text", "key", "note"),
    [
        ("sequence_length: 2048", "sequence_length", "unknown to Axolotl; did you mean sequence_len?"),
        ("micro_batchsize:", "micro_batchsize", "unknown to Axolotl; did you mean micro_batch_size?"),
        ("lr_scheduler: rex", "lr_scheduler", "rex is not supported; set sft.lr_scheduler_type to cosine"),
        (
            "optimizer: muon",
            "optimizer",
            "optimizer muon is not supported; set sft.optim, such as adamw_torch_fused",
        ),
        ("num_epochs: 1.5", "num_epochs", "1.5 is not an integer"),
        ("micro_batch_size: many", "micro_batch_size", "'many' is not a number"),
        ("eval_steps: 0.05", "eval_steps", "0.05 is a share of all steps; the number of steps is known"),
        ("val_set_size: 500", "val_set_size", "500 is a number of rows; set split.validation_share"),
        ("base_model: gpt2", "base_model", "no commit is given; set base.model to hub:<owner>/gpt2@<commit>"),
        (
            "{base_model: a/b, revision_of_model: main}",
            "base_model and revision_of_model",
            "'main' may change; set base.model to hub:a/b@<commit>",
        ),
        ("attn_implementation: flash", "attn_implementation", "flash is not supported"),
        ("deepspeed: my_zero.json", "deepspeed", "my_zero.json: no such file, and Axolotl ships none"),
        ("{adapter: lora, load_in_8bit: true}", "load_in_8bit", "an 8-bit base is not supported"),
        ("{adapter: lora, lora_r: 8}", "lora_target_modules", "not set, so PEFT chooses"),
        (
            "datasets: [{path: x.jsonl, type: {field_output: a}}]",
            "datasets[0].type",
            "custom format",
        ),
        ("datasets: [{path: x.jsonl, ds_typ: json}]", "datasets[0].ds_typ", "unknown; did you mean ds_type?"),
        ("datasets: [{path: 'ftp://x.org/a.jsonl'}]", "datasets[0]", "scheme 'ftp' is not supported"),
        ("plugins: [my.Plugin]", "plugins", "my.Plugin: Axolotl plugins are not supported; remove it"),
        ("dpo_beta: 0.1", "dpo_beta", "only supervised fine-tuning is supported"),
    ],
)
def test_unmapped_keys_are_reported_with_a_remedy(text: str, key: str, note: str) -> None:
    assert translated(text)[2][key].startswith(note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bf16: true, fp16: true}", "bf16 and fp16: choose one precision"),
        (
            "{flash_attention: true, sdp_attention: true}",
            "flash_attention and sdp_attention: choose one kernel",
        ),
        (
            "{flash_attention: true, attn_implementation: sdpa}",
            "flash_attention and attn_implementation: sdpa is another kernel",
        ),
        ("{warmup_steps: 10, warmup_ratio: 0.1}", "warmup_steps and warmup_ratio: 10 and 0.1"),
        ("{deepspeed: zero2.json, fsdp: [full_shard]}", "deepspeed and fsdp: choose one"),
        (
            "{adapter: qlora, load_in_4bit: false}",
            "adapter and load_in_4bit: qlora needs a 4-bit base",
        ),
        ("load_in_4bit: true", "load_in_4bit and adapter"),
        (
            "{gradient_checkpointing: false, fsdp_config: {activation_checkpointing: true}}",
            "would be false and",
        ),
        ("{deepspeed: zero1_torch_compile.json, torch_compile: false}", "deepspeed and torch_compile"),
        ("{eval_steps: 10, evals_per_epoch: 2}", "eval_steps and evals_per_epoch: 10 and 2"),
        ("{val_set_size: 0.1, test_datasets: [{path: a.jsonl}]}", "val_set_size and test_datasets"),
        (
            "{neftune_noise_alpha: 5, noisy_embedding_alpha: 3}",
            "neftune_noise_alpha and noisy_embedding_alpha",
        ),
        (
            "{batch_size: 9, micro_batch_size: 3, gradient_accumulation_steps: 2}",
            "batch_size and gradient_accumulation_steps: 9 is not 3 x 2",
        ),
    ],
)
def test_a_contradiction_names_both_keys(text: str, message: str, checkout: Path) -> None:
    config = checkout / "axolotl.yml"
    config.write_text(text)
    with pytest.raises(ConfigError) as caught:
        convert(config)
    assert str(caught.value).startswith(f"{config}: 1 problem(s)")
    assert message in str(caught.value)


def test_a_deepspeed_config_next_to_the_file_is_read(tmp_path: Path) -> None:
    offload = '{"device": "nvme", "nvme_path": "/fast"}'
    (tmp_path / "zero2.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": ' + offload + "}}"
    )
    values = values_of(translate({"deepspeed": "zero2.json"}, tmp_path))
    assert values["sft.strategy"] == "zero3"
    assert values["sft.offload_optimizer"] == "nvme"
    assert values["sft.offload_param"] == "none"
    assert values["sft.nvme_path"] == "/fast"


def run_import(text: str, *options: str) -> Any:
    Path("axolotl.yml").write_text(text)
    return CliRunner().invoke(app, ["import", "axolotl.yml", *options], env={"COLUMNS": "200"})


def test_without_write_the_result_is_shown_and_nothing_changes(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    done = run_import(LORA)
    assert done.exit_code == 0
    assert re.search(r"learning_rate: 2e-4\s+sft\.learning_rate = 0\.0002", done.stdout)
    assert re.search(r"output_dir: \./outputs/lora-out\s+stages write to data/", done.stdout)
    assert re.search(r"evals_per_epoch: 4\s+set sft\.eval_steps; the number of steps is known", done.stdout)
    assert (checkout / "params.yaml").read_bytes() == before


def test_write_changes_the_values_and_keeps_every_comment(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_text().splitlines()
    done = run_import(LORA, "--write")
    assert done.exit_code == 0, done.output
    after = (checkout / "params.yaml").read_text().splitlines()
    comments = [line for line in before if line.lstrip().startswith("#")]
    assert [line for line in after if line.lstrip().startswith("#")] == comments
    # Each comment stays above the key that it explains.
    assert after[after.index("  # Modules that get an adapter: all-linear, or a list of names.") + 1] == (
        "  lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]"
    )
    place = next(i for i, line in enumerate(after) if line.startswith("  # Evaluation sets."))
    assert after[place - 1] == "    chats: data/chats.jsonl"
    assert after[place + 2] == "  benchmarks:"
    params = read_params()
    assert params["sft"]["learning_rate"] == 0.0002
    assert params["sft"]["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert params["sft"]["eval_steps"] is None
    assert list(params["snapshot"]["sources"]) == ["gpt4_llm_cleaned", "chats"]


def test_an_invalid_result_is_reported_completely_and_not_written(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    done = run_import(QLORA_FSDP + "max_grad_norm: -1\n", "--write")
    assert done.exit_code == 2
    assert "Could not be mapped" in done.stdout
    assert "sft.max_grad_norm: Input should be greater than or equal to 0, got -1.0" in done.stderr
    assert (checkout / "params.yaml").read_bytes() == before
    done = run_import(QLORA_FSDP + "load_best_model_at_end: true\n", "--write")
    assert "qlora's 4-bit weights cannot be offloaded; set offload_param to none" in done.stderr
    assert "load_best_model_at_end depends on the evaluation loss; set eval_steps" in done.stderr
    assert "nothing was written" in done.stderr
    assert (checkout / "params.yaml").read_bytes() == before


def test_a_missing_file_is_an_error(checkout: Path) -> None:
    done = CliRunner().invoke(app, ["import", "axolotl.yml"])
    assert done.exit_code == 2
    assert "axolotl.yml: not found" in done.stderr


KNOWN = sorted(
    {
        *(key for group in (*GROUPS, MEMORY_KEYS) for key in group),
        *keys.DIRECT,
        *(key.replace("*", "x") for key in (*keys.NOT_NEEDED, *keys.UNMAPPED)),
        "no_such_key",
    }
)


@pytest.mark.parametrize("value", [True, False, 0, 7, 0.5, "word", ["word"], [{"path": 1}], {"a": [1]}])
def test_no_key_is_dropped_silently(value: Any) -> None:
    assert len(KNOWN) > 300
    for key in KNOWN:
        found = [one for one in translate({key: value}, Path()) if not one.is_default]
        assert any(re.match(rf"(.* and )?{key}\b", one.key) for one in found), (key, value)


def targets() -> set[str]:
    """Return every `section.key` that the code may set."""
    schemas = "|".join(section_schemas())
    text = "".join(path.read_text() for path in (ROOT / "infra" / "importers" / "axolotl").glob("*.py"))
    return set(re.findall(rf'"((?:{schemas})\.[a-z0-9_]+)"', text))


def test_every_target_is_a_key_of_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    schemas = section_schemas()
    found = targets()
    assert len(found) > 45
    for target in found:
        section, key = target.split(".")
        assert key in schemas[section].model_fields, target


def test_every_key_of_sft_has_a_counterpart_or_is_known_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ours = {
        *("num_processes", "hostfile", "early_stopping_min_delta", "max_loss_ratio", "step_timeout_seconds"),
        "fp8_base",
    }
    mapped = {target.removeprefix("sft.") for target in targets() if target.startswith("sft.")}
    assert SftParams.model_fields.keys() - mapped == ours


def test_the_import_does_not_load_torch() -> None:
    program = "import sys, infra.importers.axolotl; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
