"""LLaMA-Factory's and TRL's config files become params.yaml; no key is lost silently."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from infra.cli.app import app
from infra.importers import llamafactory, training_arguments, trl
from infra.importers.argument_names import LLAMAFACTORY, TRAINING, TRL
from infra.importers.findings import Finding
from infra.importers.hub import Offline
from infra.importers.result import values_of
from infra.importers.tools import recognise
from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError
from tests.helpers.checkouts import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Based on LLaMA-Factory's examples/train_lora/qwen3_lora_sft.yaml (Apache-2.0).
FACTORY = f"""
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
model_revision: {COMMIT}
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,chats
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
INFO = {
    "identity": {"file_name": "identity.json"},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "Kunde", "assistant_tag": "bot"},
    },
    "columns": {
        "file_name": "a.csv",
        "columns": {"prompt": "frage", "response": "antwort"},
        "num_samples": 5,
    },
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "remote": {"hf_hub_url": "owner/data", "subset": "en"},
    "elsewhere": {"ms_hub_url": "owner/data"},
}
# Based on TRL's examples/cli_configs/example_config.yaml (Apache-2.0).
TRAINER = """
model_name_or_path: ./Qwen2.5-0.5B
dataset_name: ./chats.jsonl
report_to: none
learning_rate: 0.0001
lr_scheduler_type: cosine
max_length: 2048
packing: true
use_peft: true
lora_r: 32
lora_target_modules: all-linear
eval_strategy: steps
eval_steps: 0.2
assistant_only_loss: true
"""


@pytest.fixture
def factory(in_tmp: Path) -> Path:
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp / name)
    return in_tmp


def translate(module: Any, text: str) -> list[Finding]:
    return module.translate(yaml.safe_load(text) or {}, Path(), Offline())  # type: ignore[no-any-return]


def unmapped(found: list[Finding]) -> dict[str, str]:
    return {one.key: one.note for one in found if one.kind == "unmapped"}


def test_a_lora_file_of_llamafactory_is_mapped(factory: Path) -> None:
    found = translate(llamafactory, FACTORY)
    expected = {
        "base.model": f"hub:Qwen/Qwen3-4B-Instruct-2507@{COMMIT}",
        "base.chat_template": "chatml",
        "snapshot.sources": {
            "identity": {
                "path": "data/identity.json",
                "mode": "replace",
                "limit": 1000,
                "input_separator": "\n",
            },
            "chats": {
                "path": "data/chats.jsonl",
                "mode": "replace",
                "limit": 1000,
                "columns": {"messages": "talk"},
                "roles": {"Kunde": "user"},
            },
        },
        "snapshot.benchmarks": {},
        "split.validation_share": 0.0,
        "pack.max_length": 2048,
        "pack.packing": False,
        "pack.over_length": "truncate",
        "sft.adapter": "lora",
        "sft.lora_r": 8,
        # Twice the rank.
        "sft.lora_alpha": 16,
        "sft.lora_dropout": 0.0,
        "sft.lora_target_modules": "all-linear",
        "sft.per_device_train_batch_size": 1,
        "sft.gradient_accumulation_steps": 8,
        "sft.num_train_epochs": 3,
        "sft.learning_rate": 1e-4,
        "sft.lr_scheduler_type": "cosine",
        "sft.warmup_ratio": 0.1,
        "sft.warmup_steps": 0,
        "sft.precision": "bf16",
        "sft.activation_checkpointing": True,
        "sft.save_steps": 500,
        "sft.eval_steps": None,
        "sft.optim": "adamw_torch_fused",
    }
    values = values_of(found)
    assert {key: values.get(key, "missing") for key in expected} == expected
    assert unmapped(found) == {}


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("finetuning_type: full", "sft.adapter", None),
        ("quantization_bit: 4", "sft.adapter", "qlora"),
        ("{finetuning_type: lora, quantization_bit: 8}", "sft.adapter", "lora"),
        ("lora_target: q_proj,v_proj", "sft.lora_target_modules", ["q_proj", "v_proj"]),
        ("additional_target: embed_tokens,lm_head", "sft.lora_modules_to_save", ["embed_tokens", "lm_head"]),
        ("neat_packing: true", "pack.packing", True),
        ("flash_attn: fa2", "sft.attn_implementation", "flash_attention_2"),
        ("enable_liger_kernel: true", "sft.use_liger_kernel", True),
        ("disable_gradient_checkpointing: true", "sft.activation_checkpointing", False),
        ("pure_bf16: true", "sft.precision", "bf16"),
        ("fp16: true", "sft.precision", "fp16"),
        ("{}", "sft.precision", "fp32"),
        ("{}", "sft.learning_rate", 5e-5),
        ("{}", "sft.lr_scheduler_type", "linear"),
        ("{}", "sft.warmup_steps", 0),
        ("{}", "sft.per_device_train_batch_size", 8),
        ("deepspeed: examples/deepspeed/ds_z3_offload_config.json", "sft.offload_param", "cpu"),
        ("{eval_strategy: epoch, num_train_epochs: 4, val_size: 0.1}", "sft.eval_steps", 0.25),
        ("{eval_strategy: steps, eval_steps: 50, val_size: 0.1}", "sft.eval_steps", 50),
        ("add_tokens: '<a>,<b>'", "base.added_tokens", ["<a>", "<b>"]),
        ("val_size: 0.1", "split.validation_share", 0.1),
        (
            "dataset: columns",
            "snapshot.sources",
            {
                "a": {
                    "path": "data/a.csv",
                    "mode": "replace",
                    "limit": 5,
                    "input_separator": "\n",
                    "columns": {"instruction": "frage", "output": "antwort"},
                }
            },
        ),
        (
            "{dataset: columns, mask_history: true}",
            "snapshot.sources",
            {
                "a": {
                    "path": "data/a.csv",
                    "mode": "replace",
                    "limit": 5,
                    "train_on": "last",
                    "input_separator": "\n",
                    "columns": {"instruction": "frage", "output": "antwort"},
                }
            },
        ),
    ],
)
def test_a_key_of_llamafactory_is_mapped(factory: Path, text: str, target: str, value: Any) -> None:
    assert values_of(translate(llamafactory, text)).get(target, "missing") == value


@pytest.mark.parametrize(
    ("text", "key", "note"),
    [
        ("stage: dpo", "stage", "dpo: only sft is supported; preference tuning follows it"),
        ("finetuning_type: oft", "finetuning_type", "oft: set sft.adapter"),
        ("template: mistral", "template", "mistral: no template here has this text"),
        (
            "dataset: nothing",
            "dataset.nothing",
            "dataset_info.json has no dataset 'nothing'; it has",
        ),
        ("dataset: pairs", "dataset.pairs", "ranking: pairs of answers"),
        ("dataset: elsewhere", "dataset.elsewhere", "no hf_hub_url and no file_name"),
        ("dataset: remote", "dataset.remote", "dataset owner/data: the Hub was not asked. Add `revision"),
        ("dataset_dir: other", "dataset", "dataset_info.json is in none of other"),
        ("train_on_prompt: true", "train_on_prompt", "only answers are trained"),
        ("adapter_name_or_path: x", "adapter_name_or_path", "make the adapter the champion"),
        ("use_galore: true", "use_galore", "only the optimizers of sft.optim"),
        ("use_dft_loss: true", "use_dft_loss", "only the loss of the next token"),
        ("learning_rates: 1", "learning_rates", "unknown to LLaMA-Factory; did you mean learning_rate?"),
        ("num_train_epochs: 1.5", "num_train_epochs", "1.5 is not an integer"),
    ],
)
def test_what_llamafactory_has_and_we_have_not_is_reported(
    factory: Path, text: str, key: str, note: str
) -> None:
    assert unmapped(translate(llamafactory, text))[key].startswith(note)


def test_a_malformed_dataset_info_is_reported(factory: Path) -> None:
    for content in ("{", "[]", '{"identity": {"file_name": "a.json", "columns": []}}'):
        Path("data/dataset_info.json").write_text(content)
        assert any("correct it" in note for note in unmapped(translate(llamafactory, FACTORY)).values())


def test_a_file_of_trl_is_mapped(in_tmp: Path) -> None:
    found = translate(trl, TRAINER)
    expected = {
        "base.model": "./Qwen2.5-0.5B",
        "base.chat_template": None,
        "base.dtype": "float32",
        "snapshot.sources": {"chats": {"path": "./chats.jsonl", "mode": "replace"}},
        "split.validation_share": 0.05,
        "pack.max_length": 2048,
        "pack.packing": True,
        "pack.over_length": "truncate",
        "sft.adapter": "lora",
        "sft.lora_r": 32,
        "sft.lora_alpha": 32,
        "sft.lora_dropout": 0.05,
        "sft.lora_target_modules": "all-linear",
        "sft.learning_rate": 1e-4,
        "sft.lr_scheduler_type": "cosine",
        "sft.num_train_epochs": 3,
        "sft.per_device_train_batch_size": 8,
        "sft.activation_checkpointing": True,
        "sft.precision": "auto",
        "sft.eval_steps": 0.2,
    }
    values = values_of(found)
    assert {key: values.get(key, "missing") for key in expected} == expected
    assert list(unmapped(found)) == ["dataset_test_split"]


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("{}", "sft.adapter", None),
        ("{}", "sft.learning_rate", 2e-5),
        ("{}", "pack.max_length", 1024),
        ("{use_peft: true, load_in_4bit: true}", "sft.adapter", "qlora"),
        ("{use_peft: true, load_in_8bit: true}", "sft.adapter", "lora"),
        ("{use_peft: true, lora_target_modules: [q_proj]}", "sft.lora_target_modules", ["q_proj"]),
        ("{use_peft: true, lora_modules_to_save: [lm_head]}", "sft.lora_modules_to_save", ["lm_head"]),
        ("eos_token: <|im_end|>", "base.special_tokens", {"eos_token": "<|im_end|>"}),
        ("bf16: false", "sft.precision", "fp32"),
        ("dtype: bfloat16", "base.dtype", "bfloat16"),
        ("max_steps: -1", "sft.max_steps", None),
        ("warmup_steps: 0.1", "sft.warmup_ratio", 0.1),
        ("gradient_checkpointing: false", "sft.activation_checkpointing", False),
        (
            "{eval_strategy: steps, eval_steps: 10, save_steps: 20, load_best_model_at_end: true}",
            "sft.save_steps",
            10,
        ),
        (
            "{dataset_name: a.jsonl, dataset_text_field: body}",
            "snapshot.sources",
            {"a": {"path": "a.jsonl", "mode": "replace", "columns": {"text": "body"}}},
        ),
        (
            "datasets: [{path: a.jsonl, split: 'train[:10%]'}]",
            "snapshot.sources",
            {"a": {"path": "a.jsonl", "mode": "replace", "limit": 0.1}},
        ),
    ],
)
def test_a_key_of_trl_is_mapped(in_tmp: Path, text: str, target: str, value: Any) -> None:
    assert values_of(translate(trl, text)).get(target, "missing") == value


@pytest.mark.parametrize(
    ("text", "key", "note"),
    [
        ("{}", "assistant_only_loss", "not set: of messages, only the answers are trained"),
        ("assistant_only_loss: false", "assistant_only_loss", "of messages, only the answers"),
        ("completion_only_loss: false", "completion_only_loss", "of a prompt and its completion"),
        ("loss_type: dft", "loss_type", "dft: only the loss of the next token"),
        ("chat_template_path: none.jinja", "chat_template_path", "none.jinja: no such file"),
        ("use_peft: true", "lora_target_modules", "not set, so PEFT chooses by model type"),
        ("model_init_kwargs: {a: 1}", "model_init_kwargs", "the base is loaded unchanged"),
        ("max_lenght: 5", "max_lenght", "unknown to TRL; did you mean max_length?"),
        ("resume_from_checkpoint: out", "resume_from_checkpoint", "another tool's checkpoint"),
    ],
)
def test_what_trl_has_and_we_have_not_is_reported(in_tmp: Path, text: str, key: str, note: str) -> None:
    assert unmapped(translate(trl, text))[key].startswith(note)


@pytest.mark.parametrize("value", [True, False, 0, 7, 0.5, "word", ["word"], [{"path": 1}], {"a": [1]}])
@pytest.mark.parametrize(
    ("module", "names"), [(llamafactory, LLAMAFACTORY | TRAINING), (trl, TRL | TRAINING)], ids=["lf", "trl"]
)
def test_no_key_is_dropped_silently(in_tmp: Path, module: Any, names: frozenset[str], value: Any) -> None:
    for key in sorted({*names, *training_arguments.DIRECT, "no_such_key"}):
        found = [one for one in module.translate({key: value}, Path(), Offline()) if not one.is_default]
        assert any(re.match(rf"(.* and )?{key}\b", one.key) for one in found), (key, value)


def test_the_tool_is_recognised_by_its_keys() -> None:
    assert recognise(yaml.safe_load(FACTORY), Path("a")) == "llamafactory"
    assert recognise(yaml.safe_load(TRAINER), Path("a")) == "trl"
    with pytest.raises(ConfigError, match="add --from axolotl or --from llamafactory or --from trl"):
        recognise({"learning_rate": 1, "output_dir": "x"}, Path("a"))


@pytest.mark.parametrize(("text", "options"), [(FACTORY, []), (TRAINER, ["--from", "trl"])])
def test_a_file_is_written(factory: Path, text: str, options: list[str]) -> None:
    Path("config.yaml").write_text(text)
    environment = {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    done = CliRunner().invoke(app, ["import", "config.yaml", "--write", *options], env=environment)
    assert done.exit_code == 0, done.output
    assert read_params()["sft"]["lr_scheduler_type"] == "cosine"
    assert read_params()["snapshot"]["benchmarks"] == {}
