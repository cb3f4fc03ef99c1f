"""Incompatible sft values are refused, each with a fix."""

from typing import Any

import pytest

from nightshift.core.config import problems
from tasks.sft import SftParams
from tests.helpers.sft import sft_params


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"warmup_ratio": 1.0}, "warmup_ratio: Input should be less than 1"),
        (
            {"warmup_steps": 3, "warmup_ratio": 0.1},
            "warmup_steps=3 and warmup_ratio=0.1 are mutually exclusive",
        ),
        ({"max_steps": 1}, "warmup_steps=1 must be below max_steps=1"),
        ({"lr_scheduler_type": "step"}, "step needs step_size"),
        ({"lr_scheduler_kwargs": {"gamma": 0.5}}, "linear does not take gamma; it takes nothing"),
        ({"lr_scheduler_type": "one_cycle"}, "one_cycle has its own warmup"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "depends on the evaluation loss; set eval_steps"),
        (
            {"optim": "schedule_free_adamw"},
            "schedule_free_adamw needs lr_scheduler_type constant, got linear",
        ),
        (
            {"optim": "schedule_free_adamw"},
            "optim schedule_free_adamw needs strategy single or ddp, got zero2",
        ),
        (
            {"optim": "schedule_free_adamw", "load_best_model_at_end": True, "eval_steps": 1},
            "schedule_free_adamw trains and saves other weights than it evaluates",
        ),
        ({"strategy": "single"}, "strategy single is one process; set num_processes=2 to auto"),
        ({"strategy": "ddp", "offload_optimizer": "cpu"}, "offload_optimizer cpu needs strategy zero1"),
        ({"strategy": "zero3", "offload_param": "nvme"}, "needs nvme_path"),
        ({"strategy": "zero2", "offload_param": "cpu"}, "offload_param cpu needs strategy zero3 or fsdp2"),
        ({"offload_optimizer": "cpu", "optim": "adafactor"}, "set optim to adamw_torch, got adafactor"),
        ({"adapter": None, "use_dora": True}, "use_dora needs an adapter"),
        ({"fp8_base": True, "adapter": "qlora"}, "fp8_base is incompatible with adapter qlora"),
        ({"fp8_base": True, "adapter": None}, "fp8_base is incompatible with adapter None"),
        ({"fp8_base": True, "strategy": "fsdp2"}, "fp8_base is incompatible with strategy fsdp2"),
        ({"fp8_base": True, "precision": "fp16"}, "fp8_base is incompatible with precision fp16"),
        ({"fp8_base": True, "lora_dropout": 0.1}, "fp8_base is incompatible with lora_dropout 0.1"),
        ({"fp8_base": True, "use_dora": True}, "fp8_base is incompatible with use_dora"),
        ({"fp8_base": True, "torch_compile": True}, "fp8_base is incompatible with torch_compile"),
        ({"adapter": "qlora", "strategy": "zero3"}, "qlora's 4-bit weights cannot be sharded by zero3"),
        (
            {"early_stopping_patience": 2},
            "early_stopping_patience depends on the evaluation loss; set eval_steps",
        ),
        (
            {"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 2},
            "eval_steps=5 must be a multiple of save_steps=2",
        ),
        (
            {"load_best_model_at_end": True, "eval_steps": 0.25, "save_steps": 0.1},
            "eval_steps=0.25 must be a multiple of save_steps=0.1",
        ),
        (
            {"load_best_model_at_end": True, "eval_steps": 0.2, "save_steps": 10},
            "both as numbers or both as shares",
        ),
        ({"eval_steps": 1.5}, "must be a number of steps from 1, or a share between 0 and 1, got 1.5"),
        ({"save_steps": 0}, "must be a number of steps from 1, or a share between 0 and 1, got 0"),
        ({"lora_target_modules": "(q|v"}, "is not a regular expression"),
        ({"lora_modules_to_save": ["norm"], "strategy": "zero3"}, "zero3 shards them; use zero2"),
        ({"lora_modules_to_save": ["norm"], "strategy": "fsdp2"}, "fsdp2 shards them; use zero2"),
        ({"lora_modules_to_save": ["norm"], "adapter": None}, "lora_modules_to_save needs an adapter"),
        ({"lora_modules_to_save": ["norm"], "loraplus_lr_ratio": 2}, "sets rates for the adapter only"),
        (
            {"lora_modules_to_save": ["o_proj"], "lora_target_modules": ["o_proj"]},
            "lora_modules_to_save and lora_target_modules both name o_proj",
        ),
        (
            {"lora_target_parameters": ["w"], "lora_dropout": 0.1},
            "lora_target_parameters is incompatible with lora_dropout 0.1",
        ),
        ({"lora_target_parameters": ["w"], "use_dora": True}, "is incompatible with use_dora"),
        ({"lora_target_parameters": ["w"], "strategy": "zero3"}, "incompatible with strategy zero3"),
        ({"lora_target_parameters": ["w"], "adapter": None}, "lora_target_parameters needs an adapter"),
        ({"optim": "paged_lion_32bit", "strategy": "fsdp2"}, "cannot shard its state for fsdp2"),
        ({"optim": "adafactor", "strategy": "fsdp2"}, "adafactor cannot shard its state for fsdp2"),
        ({"lora_layers_to_transform": [0], "adapter": None}, "lora_layers_to_transform needs an adapter"),
        ({"lora_layers_to_transform": []}, "sft.lora_layers_to_transform"),
        ({"lora_layers_to_transform": [0], "lora_target_parameters": ["w"]}, "lora_layers_to_transform; set"),
        ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters is for full fine-tuning, and adapter"),
        ({"unfrozen_parameters": ["(a"], "adapter": None}, "is not a regular expression"),
        (
            {
                "unfrozen_parameters": ["a"],
                "adapter": None,
                "use_reentrant": True,
                "activation_checkpointing": True,
            },
            "gives no gradients when the embeddings are frozen",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
            "num_decay_steps: Input should be greater than or equal to 2, got 1",
        ),
        (
            {"optim": "adamw_torch_4bit"},
            "optim: adamw_torch_4bit is not supported: torchao is not among the pinned",
        ),
        ({"optim": "muon", "strategy": "zero2"}, "optim muon needs strategy single or ddp, got zero2"),
        ({"optim": "muon", "strategy": "ddp", "loraplus_lr_ratio": 2}, "one learning rate for A and B"),
        ({"use_reentrant": True}, "use_reentrant=true needs activation_checkpointing=true"),
    ],
)
def test_a_conflict_is_reported_with_its_fix(changes: dict[str, Any], problem: str) -> None:
    values = sft_params().model_dump() | changes
    assert problem in "\n".join(problems(SftParams, "sft", values))


@pytest.mark.parametrize(("evaluation", "saving"), [(0.25, 1 / 12), (1 / 6, 1 / 6), (10, 5)])
def test_a_checkpoint_at_each_evaluation_is_enough_for_the_best_model(
    evaluation: float, saving: float
) -> None:
    sft_params(load_best_model_at_end=True, eval_steps=evaluation, save_steps=saving)


def test_all_conflicts_are_reported_at_once() -> None:
    values = sft_params().model_dump() | {"adapter": None, "use_dora": True, "use_reentrant": True}
    (message,) = problems(SftParams, "sft", values)
    assert message.splitlines()[0].startswith("sft: use_dora needs an adapter")
    assert message.splitlines()[1].startswith("  sft: use_reentrant=true needs activation_checkpointing")
