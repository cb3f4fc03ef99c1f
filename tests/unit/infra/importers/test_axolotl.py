"""Axolotl configs become params.yaml: expected values are literals, no key is lost silently."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.imports import AnyCommit
from infra.cli.app import app
from infra.importers.axolotl import GROUPED, keys, schema_keys, translate
from infra.importers.hub import Offline
from infra.importers.result import values_of
from infra.importers.tools import convert
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
  - path: data/more.jsonl
    ds_type: json
    type: alpaca
    split: train[:20%]
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
    found = translate(yaml.safe_load(text), Path(), Offline())
    notes = {
        kind: {one.key: one.note for one in found if one.kind == kind} for kind in ("not_needed", "unmapped")
    }
    return values_of(found), notes["not_needed"], notes["unmapped"]


def test_a_lora_file_is_mapped() -> None:
    values, not_needed, unmapped = translated(LORA)
    assert values == {
        "base.model": "hub:NousResearch/Llama-3.2-1B@2f7c4f8bc10f4a3fd5d3d5c0f3d0f7b4b52c1a3e",
        "snapshot.sources": {
            "gpt4_llm_cleaned": {
                "path": "hub:teknium/GPT4-LLM-Cleaned@00112233445566778899aabbccddeeff00112233",
                "mode": "replace",
                "split": "train",
                "input_separator": "\n\n### Input:\n",
            },
            "more": {
                "path": "data/more.jsonl",
                "mode": "replace",
                "limit": 0.2,
                "input_separator": "\n\n### Input:\n",
            },
        },
        "base.chat_template": "alpaca",
        "base.dtype": "bfloat16",
        "base.added_tokens": [],
        "base.special_tokens": {},
        "snapshot.benchmarks": {},
        "evaluate.retrieval": None,
        "gate.floors": {},
        "gate.retention": {},
        "gate.behaviour": [],
        "split.by_phrasing": [],
        "augment.sources": [],
        "split.validation_share": 0.1,
        "split.test_share": 0.1,
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
        "sft.lora_modules_to_save": [],
        "sft.lora_target_parameters": [],
        "sft.lora_layers_to_transform": None,
        "sft.unfrozen_parameters": [],
        "sft.loss_watchdog_threshold": 5.0,
        "sft.loss_watchdog_patience": 3,
        "sft.eval_steps": 0.25,
        "sft.eval_packing": True,
        "sft.early_stopping_patience": None,
        "sft.load_best_model_at_end": False,
        "sft.logging_steps": 1,
    }
    assert list(unmapped) == ["hub_model_id"]
    for key in ("output_dir", "wandb_project", "tf32", "liger_rms_norm", "special_tokens.pad_token"):
        assert key in not_needed
    # One save per epoch in one epoch is the result itself.
    assert not_needed["saves_per_epoch"].startswith("the result is always saved")
    assert not_needed["lora_model_dir, wandb_entity, resume_from_checkpoint"].startswith("empty")


def test_a_qlora_fsdp_file_is_mapped() -> None:
    values, not_needed, unmapped = translated(QLORA_FSDP)
    expected = {
        "base.model": "./models/llama-3-70b",
        "pack.packing": False,
        "sft.strategy": "fsdp2",
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
    assert "git ls-remote https://huggingface.co/datasets/tatsu-lab/alpaca" in unmapped["datasets[0]"]
    assert list(unmapped) == ["datasets[0]", "datasets", "fsdp_config.offload_params"]
    # 4-bit weights cannot be offloaded.
    assert values["sft.offload_param"] == "none"
    assert not_needed["group_by_length"].startswith("rows are packed to equal length")
    assert not_needed["fsdp_config.transformer_layer_cls_to_wrap"] == "set automatically"


def test_an_old_file_is_mapped() -> None:
    values, not_needed, unmapped = translated(OLD)
    expected = {
        "snapshot.sources": {
            "vicuna": {
                "path": "data/vicuna.json",
                "mode": "replace",
                "columns": {"messages": "conversations"},
            }
        },
        "base.chat_template": "vicuna",
        "base.dtype": "float32",
        "split.validation_share": 0.0,
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
    assert sorted(unmapped) == ["datasets[1]", "max_packed_sequence_len", "rl"]
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
        ("{adapter: lora, load_in_8bit: true}", "sft.adapter", "lora"),
        ("optimizer: adamw_torch_8bit", "sft.optim", "adamw_8bit"),
        ("optimizer: adamw_torch_4bit", "sft.optim", "adamw_8bit"),
        ("optimizer: paged_adamw_32bit", "sft.optim", "paged_adamw_32bit"),
        ("optimizer: muon", "sft.optim", "muon"),
        ("{optimizer: muon, deepspeed: zero2.json}", "sft.strategy", "ddp"),
        ("{adapter: lora, lora_target_modules: '.*q_proj'}", "sft.lora_target_modules", ".*q_proj"),
        (
            "{adapter: lora, lora_modules_to_save: [lm_head]}",
            "sft.lora_modules_to_save",
            ["lm_head"],
        ),
        (
            "{adapter: lora, lora_target_parameters: [mlp.experts.down_proj]}",
            "sft.lora_target_parameters",
            ["mlp.experts.down_proj"],
        ),
        (
            "{adapter: lora, peft_layers_to_transform: [6, 7]}",
            "sft.lora_layers_to_transform",
            [6, 7],
        ),
        ("{adapter: lora, peft_layers_to_transform: 7}", "sft.lora_layers_to_transform", [7]),
        (
            "unfrozen_parameters: ['^lm_head.weight$', 'model.layers.3[01].']",
            "sft.unfrozen_parameters",
            [r"^lm_head\.weight$", r"model\.layers\.3[01]\."],
        ),
        ("warmup_steps: 0.1", "sft.warmup_ratio", 0.1),
        ("{cosine_min_lr_ratio: 1.0, warmup_steps: 5}", "sft.lr_scheduler_type", "constant"),
        ("{cosine_min_lr_ratio: 1.0, warmup_steps: 5}", "sft.warmup_steps", 5),
        ("loss_watchdog_threshold: 5.0", "sft.loss_watchdog_threshold", 5.0),
        ("{}", "sft.loss_watchdog_threshold", None),
        ("{}", "split.validation_share", 0.0),
        ("{}", "sft.eval_steps", None),
        ("{evals_per_epoch: 4, num_epochs: 3, val_set_size: 0.1}", "sft.eval_steps", pytest.approx(1 / 12)),
        ("{saves_per_epoch: 2, num_epochs: 2}", "sft.save_steps", 0.25),
        ("save_steps: 0.5", "sft.save_steps", 0.5),
        ("{eval_steps: 0.05, val_set_size: 0.1}", "sft.eval_steps", 0.05),
        ("{eval_strategy: epoch, num_epochs: 2, val_set_size: 0.1}", "sft.eval_steps", 0.5),
        # The best model has to be saved: there is a checkpoint at each evaluation.
        (
            "{evals_per_epoch: 4, saves_per_epoch: 1, load_best_model_at_end: true, val_set_size: 0.1}",
            "sft.save_steps",
            0.25,
        ),
        ("special_tokens: {eos_token: <|im_end|>}", "base.special_tokens", {"eos_token": "<|im_end|>"}),
        ("special_tokens: {eos_token: <|im_end|>}", "base.added_tokens", ["<|im_end|>"]),
        ("tokens: [<|im_start|>, <|im_end|>]", "base.added_tokens", ["<|im_start|>", "<|im_end|>"]),
        (
            "{tokens: [a], special_tokens: {additional_special_tokens: [b]}}",
            "base.added_tokens",
            ["a", "b"],
        ),
        ("{bf16: false, fp16: false}", "base.dtype", "float32"),
        ("{datasets: [{path: x.jsonl}], chat_template: chatml}", "base.chat_template", "chatml"),
        ("{datasets: [{path: x.jsonl}], chat_template: qwen_25}", "base.chat_template", "qwen2_5"),
        ("{datasets: [{path: x.jsonl}], chat_template: tokenizer_default}", "base.chat_template", None),
        (
            "{datasets: [{path: x.jsonl, type: alpaca}], chat_template: chatml}",
            "base.chat_template",
            "alpaca",
        ),
        ("datasets: [{path: x.jsonl, type: completion}]", "pack.over_length", "split"),
        ("datasets: [{path: x.jsonl, type: alpaca}]", "pack.over_length", "drop"),
        ("{flash_attention: true, sdp_attention: true}", "sft.attn_implementation", "flash_attention_2"),
        ("{flash_attention: true, attn_implementation: sdpa}", "sft.attn_implementation", "sdpa"),
        (
            "{gradient_checkpointing: false, fsdp_config: {activation_checkpointing: true}}",
            "sft.activation_checkpointing",
            True,
        ),
        ("{deepspeed: {gradient_clipping: 0.5}}", "sft.max_grad_norm", 0.5),
        ("{adapter: qlora, load_in_4bit: true, deepspeed: zero3.json}", "sft.strategy", "fsdp2"),
        ("{fsdp: [full_shard], optimizer: adamw_8bit}", "sft.optim", "adamw_torch"),
        (
            "{torch_compile: true, plugins: [axolotl.integrations.liger.LigerPlugin]}",
            "sft.torch_compile",
            False,
        ),
        (
            "{adapter: lora, lora_modules_to_save: [lm_head], deepspeed: zero3.json}",
            "sft.strategy",
            "zero2",
        ),
        ("{adapter: lora, loraplus_lr_ratio: 16}", "sft.loraplus_lr_ratio", 16.0),
        ("{adapter: lora, peft_use_dora: true}", "sft.use_dora", True),
        ("torch_compile: auto", "sft.torch_compile", True),
        ("gradient_checkpointing: offload", "sft.activation_checkpointing", True),
        ("{evals_per_epoch: 0, val_set_size: 0.1}", "sft.eval_steps", None),
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
            "optimizer: sgd",
            "optimizer",
            "optimizer sgd is not supported; set sft.optim, such as adamw_torch_fused",
        ),
        ("num_epochs: 1.5", "num_epochs", "1.5 is not an integer"),
        ("micro_batch_size: many", "micro_batch_size", "'many' is not a number"),
        ("val_set_size: 500", "val_set_size", "500 is a number of rows; set split.validation_share"),
        (
            "base_model: gpt2",
            "base_model",
            "model gpt2: the Hub was not asked. Set base.model to hub:<owner>/gpt2",
        ),
        (
            "{base_model: a/b, revision_of_model: main}",
            "base_model and revision_of_model",
            "model a/b: the Hub was not asked. Set base.model to hub:a/b@<commit>",
        ),
        ("attn_implementation: flash", "attn_implementation", "flash is not supported"),
        ("deepspeed: my_zero.json", "deepspeed", "my_zero.json: no such file, and no tool ships it"),
        ("{adapter: lora, lora_r: 8}", "lora_target_modules", "not set, so PEFT chooses"),
        (
            "datasets: [{path: x.jsonl, type: {field_output: a}}]",
            "datasets[0]",
            "type custom format: not supported",
        ),
        (
            "datasets: [{path: x.jsonl, type: 'alpaca:chat'}]",
            "datasets[0]",
            "type alpaca:chat: not supported",
        ),
        ("datasets: [{path: x.jsonl, split: 'train[5:]'}]", "datasets[0]", "split 'train[5:]' is not"),
        ("datasets: [{path: x.jsonl, shards: 2, shards_idx: 1}]", "datasets[0]", "shards with a slice"),
        ("datasets: [{path: x.jsonl, shards: 0}]", "datasets[0]", "shards with a slice"),
        (
            "datasets: [{path: x.jsonl, field_thinking: t, template_thinking_key: thinking}]",
            "datasets[0].field_thinking",
            "t: has no counterpart; write the file as plain messages",
        ),
        (
            "datasets: [{path: x.jsonl, message_property_mappings: {role: who}}]",
            "datasets[0].message_property_mappings",
            "role: who: rename these keys",
        ),
        (
            "{datasets: [{path: x.jsonl}], chat_template: llama4}",
            "chat_template",
            "llama4: no template here has this text; save Axolotl's llama4.jinja in a file",
        ),
        (
            "{datasets: [{path: x.jsonl}], chat_template_jinja: '{{ messages }}'}",
            "chat_template_jinja",
            "save the template in a file, and set base.chat_template to its path",
        ),
        (
            "datasets: [{path: x.jsonl, type: alpaca}, {path: y.jsonl}]",
            "datasets",
            "alpaca and chat_template have different prompts",
        ),
        ("train_on_inputs: true", "train_on_inputs", "only assistant turns are labelled"),
        ("resume_from_checkpoint: out/checkpoint-5", "resume_from_checkpoint", "another tool's checkpoint"),
        ("{}", "learning_rate", "not set, and Axolotl requires it; set sft.learning_rate"),
        ("adapter: lora", "lora_r", "not set, and Axolotl has no default"),
        ("moe_bnb_fast: true", "moe_bnb_fast", "experts are computed as transformers does"),
        ("dsv4_bf16_all: true", "dsv4_bf16_all", "has no counterpart; remove it"),
        (
            "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: true}}",
            "deepspeed.zero_optimization.offload_optimizer",
            "True is not a mapping",
        ),
        ("deepspeed: {zero_optimization: [2]}", "deepspeed", "zero_optimization: [2] is not a mapping"),
        ("deepspeed: {optimizer: {type: Adam}}", "deepspeed.optimizer", "set sft.optim: DeepSpeed's own"),
        (
            "deepspeed: {zero_quantized_weights: true}",
            "deepspeed.zero_quantized_weights",
            "has no counterpart",
        ),
        ("datasets: [{path: x.jsonl, ds_typ: json}]", "datasets[0].ds_typ", "unknown; did you mean ds_type?"),
        ("datasets: [{path: 'ftp://x.org/a.jsonl'}]", "datasets[0]", "scheme 'ftp' is not supported"),
        ("plugins: [my.Plugin]", "plugins", "my.Plugin: Axolotl plugins are not supported; remove it"),
        ("dpo_beta: 0.1", "dpo_beta", "preference tuning follows supervised fine-tuning here"),
    ],
)
def test_unmapped_keys_are_reported_with_a_remedy(text: str, key: str, note: str) -> None:
    assert translated(text)[2][key].startswith(note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bf16: true, fp16: true}", "bf16 and fp16: choose one precision"),
        ("{warmup_steps: 10, warmup_ratio: 0.1}", "warmup_steps and warmup_ratio: 10 and 0.1"),
        ("{deepspeed: zero2.json, fsdp: [full_shard]}", "deepspeed and fsdp: choose one"),
        (
            "{adapter: qlora, load_in_4bit: false}",
            "adapter and load_in_4bit: qlora needs a 4-bit base",
        ),
        ("load_in_4bit: true", "load_in_4bit and adapter"),
        (
            "{gradient_checkpointing: false, activation_checkpointing: true}",
            "gradient_checkpointing and activation_checkpointing: False and True",
        ),
        (
            "{val_set_size: 0, eval_steps: 25, save_steps: 25, load_best_model_at_end: true}",
            "val_set_size and eval_steps: no rows are held out to evaluate on",
        ),
        ("{deepspeed: {fp16: {enabled: true}}, bf16: true}", "sft.precision would be bf16 and fp16"),
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
        convert(config, "axolotl", Offline())
    assert str(caught.value).startswith(f"{config}: 1 problem(s)")
    assert message in str(caught.value)


def test_a_deepspeed_config_next_to_the_file_is_read(tmp_path: Path) -> None:
    offload = '{"device": "nvme", "nvme_path": "/fast"}'
    (tmp_path / "zero2.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": ' + offload + "}}"
    )
    values = values_of(translate({"deepspeed": "zero2.json"}, tmp_path, Offline()))
    assert values["sft.strategy"] == "zero3"
    assert values["sft.offload_optimizer"] == "nvme"
    assert values["sft.offload_param"] == "none"
    assert values["sft.nvme_path"] == "/fast"


def run_import(text: str, *options: str) -> Any:
    Path("axolotl.yml").write_text(text)
    return CliRunner().invoke(
        app, ["import", "axolotl.yml", *options], env={"COLUMNS": "220", "HF_HUB_OFFLINE": "1"}
    )


def test_without_write_the_result_is_shown_and_nothing_changes(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    done = run_import(LORA)
    assert done.exit_code == 0
    assert re.search(r"learning_rate: 2e-4\s+sft\.learning_rate = 0\.0002", done.stdout)
    assert re.search(r"output_dir: \./outputs/lora-out\s+stages write to data/", done.stdout)
    assert re.search(r"evals_per_epoch: 4\s+sft\.eval_steps = 0\.25\s+4 per epoch", done.stdout)
    assert (checkout / "params.yaml").read_bytes() == before


def test_an_unmapped_key_shows_what_holds_instead(checkout: Path) -> None:
    done = run_import(LORA + "lr_groups: [{name: a, modules: [b], lr: 1e-5}]\nddp_timeout: 60\n")
    assert re.search(r"ddp_timeout: 60.*sft\.step_timeout_seconds = 1800", done.stdout)
    assert re.search(r"lr_groups.*nothing", done.stdout)


def test_write_changes_the_values_and_keeps_every_comment(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_text().splitlines()
    done = run_import(LORA, "--write")
    assert done.exit_code == 0, done.output
    after = (checkout / "params.yaml").read_text().splitlines()
    comments = [line for line in before if line.lstrip().startswith("#")]
    assert [line for line in after if line.lstrip().startswith("#")] == comments
    params = read_params()
    assert params["sft"]["learning_rate"] == 0.0002
    assert params["sft"]["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert params["sft"]["eval_steps"] == 0.25
    assert list(params["snapshot"]["sources"]) == ["gpt4_llm_cleaned", "more"]
    assert params["snapshot"]["benchmarks"] == params["gate"]["retention"] == {}
    assert params["gate"]["behaviour"] == params["split"]["by_phrasing"] == []
    assert params["evaluate"]["retrieval"] is None


def test_nothing_is_written_if_data_cannot_be_mapped_unless_partial(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    done = run_import(QLORA_FSDP, "--write")
    assert done.exit_code == 2
    assert "Could not be mapped" in done.stdout
    assert "base, data or objective could not be mapped" in done.stderr
    assert "datasets[0]: dataset tatsu-lab/alpaca" in done.stderr
    assert (checkout / "params.yaml").read_bytes() == before
    done = run_import(QLORA_FSDP, "--write", "--partial")
    assert done.exit_code == 0, done.output
    assert read_params()["sft"]["adapter"] == "qlora"


@pytest.mark.parametrize(
    "key", ["rl: dpo", "reward_model: true", "qat: {a: 1}", "unfrozen_parameters: ['a[0:5]']"]
)
def test_another_objective_is_refused(checkout: Path, key: str) -> None:
    done = run_import(f"{LORA}\n{key}\n", "--write")
    assert done.exit_code == 2
    assert key.partition(":")[0] in done.stderr


def test_an_invalid_result_is_reported_completely_and_not_written(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    done = run_import(LORA + "max_grad_norm: -1\nearly_stopping_patience: 0\n", "--write")
    assert done.exit_code == 2
    assert "sft.max_grad_norm: Input should be greater than or equal to 0, got -1.0" in done.stderr
    assert "sft.early_stopping_patience: Input should be greater than or equal to 1" in done.stderr
    assert "nothing was written" in done.stderr
    assert (checkout / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\nbase_model: x\n", "the key seed occurs twice"),
        ("[1, 2]", "must map sections to values"),
        ("a: [", "not valid YAML"),
        ("colour: red", "do not show of which tool it is; add --from axolotl or --from"),
    ],
)
def test_a_malformed_file_is_an_error(checkout: Path, text: str, message: str) -> None:
    done = run_import(text)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_missing_file_is_an_error(checkout: Path) -> None:
    done = CliRunner().invoke(app, ["import", "axolotl.yml"])
    assert done.exit_code == 2
    assert "axolotl.yml: not found" in done.stderr


KNOWN = sorted(
    {
        *GROUPED,
        *keys.DIRECT,
        *(key.replace("*", "x") for key in (*keys.NOT_NEEDED, *keys.UNMAPPED)),
        *schema_keys.CONFIG,
        *schema_keys.PLUGINS,
        "no_such_key",
    }
)


@pytest.mark.parametrize("value", [True, False, 0, 7, 0.5, "word", ["word"], [{"path": 1}], {"a": [1]}])
def test_no_key_is_dropped_silently(value: Any) -> None:
    assert len(KNOWN) > 500
    for key in KNOWN:
        found = [one for one in translate({key: value}, Path(), Offline()) if not one.is_default]
        assert any(re.match(rf"(.* and )?{key}\b", one.key) for one in found), (key, value)


def targets() -> set[str]:
    """Return every `section.key` that the code may set."""
    schemas = "|".join(section_schemas())
    text = "".join(path.read_text() for path in (ROOT / "infra" / "importers").rglob("*.py"))
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
    program = "import sys, infra.importers.tools; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


COMMON = {
    "split.validation_share": 0.05,
    "base.chat_template": "alpaca",
    "pack.packing": True,
    "sft.lr_scheduler_type": "cosine",
    "sft.warmup_ratio": 0.1,
    "sft.precision": "auto",
    "sft.attn_implementation": "flash_attention_2",
    "sft.activation_checkpointing": True,
    # Four evaluations and one checkpoint in each of four epochs.
    "sft.eval_steps": 1 / 16,
    "sft.save_steps": 1 / 4,
    "sft.per_device_train_batch_size": 2,
    "sft.num_train_epochs": 4,
    "sft.logging_steps": 1,
}
SHIPPED = {
    "axolotl-phi2-ft.yml": {
        "base.model": "hub:microsoft/phi-2@" + "0123456789abcdef0123456789abcdef01234567",
        "pack.max_length": 2048,
        "sft.gradient_accumulation_steps": 1,
        "sft.use_reentrant": True,
        "sft.learning_rate": 3e-6,
        "sft.optim": "adamw_torch_fused",
        "sft.adam_beta2": 0.95,
        "sft.adam_epsilon": 1e-5,
        "sft.weight_decay": 0.1,
        "sft.max_grad_norm": 1.0,
    },
    "axolotl-lora-8b.yml": {
        "base.model": "hub:NousResearch/Meta-Llama-3-8B@" + "0123456789abcdef0123456789abcdef01234567",
        "pack.max_length": 4096,
        "sft.gradient_accumulation_steps": 4,
        "sft.adapter": "lora",
        "sft.lora_r": 32,
        "sft.lora_alpha": 16,
        "sft.lora_dropout": 0.05,
        "sft.lora_target_modules": "all-linear",
        "sft.lora_modules_to_save": ["embed_tokens", "lm_head"],
        "sft.eval_packing": False,
        "sft.learning_rate": 2e-4,
        "sft.optim": "adamw_8bit",
        "sft.weight_decay": 0.0,
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_two_examples_means_what_axolotl_documents(name: str) -> None:
    config = yaml.safe_load((ROOT / "tests" / "examples" / name).read_text())
    found = translate(config, ROOT / "tests" / "examples", AnyCommit())
    given = {one.target: one.value for one in found if one.kind == "mapped" and not one.is_default}
    (source,) = given.pop("snapshot.sources").values()
    assert given == COMMON | SHIPPED[name]
    assert (source["split"], source["input_separator"]) == ("train", "\n\n### Input:\n")
    assert [one.key for one in found if one.kind == "unmapped"] == []
