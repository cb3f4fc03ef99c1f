"""Map the arguments of transformers' TrainingArguments, which LLaMA-Factory and TRL share.

The defaults are those of transformers 5; a tool passes its own.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from infra.importers.axolotl.keys import NOTES, map_optimizer, parse_compile
from infra.importers.deepspeed import TARGETS, map_deepspeed
from infra.importers.findings import (
    Config,
    Finding,
    Findings,
    convert_value,
    default,
    essential,
    mapped,
    match,
    not_needed,
    parse_bool,
    parse_float,
    parse_int,
    parse_interval,
    parse_nonzero,
    share_of_steps,
    split_empty,
    unknown,
    unmapped,
)
from infra.importers.fit import fit
from infra.importers.hub import Lookup
from infra.importers.result import finish, values_of
from infra.importers.schedule import map_schedule
from infra.importers.sources import map_base

Convert = Callable[[Any], Any]
DEFAULT = "the default of transformers"


def parse_limit(value: Any) -> int | None:
    """Parse a number of steps; -1 becomes None.

    Raises:
        ValueError: The value is not an integer.
    """
    number = parse_int(value)
    return number if number > 0 else None


DIRECT: dict[str, tuple[str, Convert]] = {
    "per_device_train_batch_size": ("sft.per_device_train_batch_size", parse_int),
    "per_device_eval_batch_size": ("sft.per_device_eval_batch_size", parse_int),
    "gradient_accumulation_steps": ("sft.gradient_accumulation_steps", parse_int),
    "num_train_epochs": ("sft.num_train_epochs", parse_int),
    "max_steps": ("sft.max_steps", parse_limit),
    "learning_rate": ("sft.learning_rate", parse_float),
    "optim": ("sft.optim", map_optimizer),
    "adam_beta1": ("sft.adam_beta1", parse_float),
    "adam_beta2": ("sft.adam_beta2", parse_float),
    "adam_epsilon": ("sft.adam_epsilon", parse_float),
    "weight_decay": ("sft.weight_decay", parse_float),
    "max_grad_norm": ("sft.max_grad_norm", parse_float),
    "label_smoothing_factor": ("sft.label_smoothing_factor", parse_float),
    "neftune_noise_alpha": ("sft.neftune_noise_alpha", parse_nonzero),
    "torch_compile": ("sft.torch_compile", parse_compile),
    "use_liger_kernel": ("sft.use_liger_kernel", parse_bool),
    "load_best_model_at_end": ("sft.load_best_model_at_end", parse_bool),
    "save_total_limit": ("sft.save_total_limit", parse_int),
    "logging_steps": ("sft.logging_steps", parse_int),
    "seed": ("sft.seed", parse_int),
}
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "max_steps": None,
    "learning_rate": 5e-5,
    "optim": "adamw_torch_fused",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "torch_compile": False,
    "use_liger_kernel": False,
    "load_best_model_at_end": False,
}
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
PRECISION = ("bf16", "fp16", "tf32")
SHARDING = ("deepspeed", "fsdp", "fsdp_config")
EVALUATION = ("eval_strategy", "evaluation_strategy", "eval_steps", "do_eval")
SAVING = ("save_strategy", "save_steps")
GROUPED = (*SCHEDULE, *PRECISION, *SHARDING, *EVALUATION, *SAVING)
_LAUNCH = "set by the launcher; sft.num_processes is the number of ranks"
_LOGS = "runs, metrics and models are logged to MLflow automatically"
_LOADER = "the data loader is set automatically: one sequential pass over the plan"
NOT_NEEDED: dict[str, str] = {
    "output_dir": "stages write to data/, checkpoints to .nightshift",
    "overwrite_output_dir": "a changed parameter starts a new training run",
    "do_train": "training is the stage sft",
    "report_to": _LOGS,
    "run_name": _LOGS,
    "project": _LOGS,
    "trackio_*": _LOGS,
    "logging_*": _LOGS,
    "log_*": _LOGS,
    "disable_tqdm": _LOGS,
    "push_to_hub": "models go to the MLflow registry",
    "hub_*": "models go to the MLflow registry",
    "dataloader_*": _LOADER,
    "remove_unused_columns": _LOADER,
    "group_by_length": _LOADER,
    "length_column_name": _LOADER,
    "train_sampling_strategy": _LOADER,
    "ddp_*": _LAUNCH,
    "local_rank": _LAUNCH,
    "accelerator_config": _LAUNCH,
    "save_only_model": "checkpoints contain everything that is needed to resume",
    "save_safetensors": "weights are always saved as safetensors",
    "save_on_each_node": "one node saves",
    "average_tokens_across_devices": "the loss is always a mean over the tokens of all devices",
    "torch_empty_cache_steps": "memory is managed by PyTorch",
    "use_cache": "training never uses the KV cache",
    "include_num_input_tokens_seen": "always measured",
    "include_tokens_per_second": "always measured",
    "prediction_loss_only": "only the loss is computed in the evaluation",
    "fp16_full_eval": "the evaluation uses the precision of the training",
    "bf16_full_eval": "the evaluation uses the precision of the training",
    "skip_memory_metrics": "the peak memory is always measured",
    "full_determinism": "the row order and all seeds are fixed",
    "data_seed": "sft.seed also orders the rows",
    "use_cpu": "the device is chosen by the machine",
    "gradient_checkpointing_kwargs": "the newer variant is used; it gives the same gradients",
    "activation_checkpointing_kwargs": "the newer variant is used; it gives the same gradients",
    "eval_accumulation_steps": "only the loss is kept",
    "eval_on_start": "the base is evaluated by the stage evaluate",
    "liger_kernel_config": "all of Liger's kernels for the model are on",
}
UNMAPPED: dict[str, str] = {
    "auto_find_batch_size": "after out of memory, the micro-batch is halved; set "
    "sft.per_device_train_batch_size",
    "optim_args": "set sft.adam_beta1, sft.adam_beta2 and sft.adam_epsilon",
    "optim_target_modules": "the optimizer updates all trained weights; remove it",
    "metric_for_best_model": "the validation loss is used; remove it",
    "greater_is_better": "the validation loss is used; remove it",
    "resume_from_checkpoint": "another tool's checkpoint cannot be continued; to train its weights further, "
    "set base.model to their folder",
    "torch_compile_*": "sft.torch_compile uses the defaults; remove it",
}
ESSENTIAL = ("resume_from_checkpoint",)


def map_arguments(config: Config, folder: Path, defaults: Mapping[str, Any] = DEFAULTS) -> Findings:
    """Map the arguments that transformers defines.

    Args:
        config: Config, key -> value.
        folder: Folder of the file.
        defaults: Value of each missing argument.
    """
    for key, (target, convert) in DIRECT.items():
        if key in config:
            yield convert_value(key, target, config[key], convert, NOTES.get(str(config[key]), ""))
        elif key in defaults:
            yield default(key, target, defaults[key], "the tool's default")
    yield from _schedule(config)
    yield from _sharding(config, folder)
    yield from _evaluation(config, defaults)


def _schedule(config: Config) -> Findings:
    """Map the schedule, with the names and defaults of transformers: linear, without warmup."""
    given = {key: config[key] for key in (*SCHEDULE[1:], "learning_rate") if key in config}
    if "warmup_steps" not in given and "warmup_ratio" not in given:
        given["warmup_steps"] = 0
    name = str(config.get("lr_scheduler_type", "linear"))
    for one in map_schedule({**given, "lr_scheduler": name}):
        key = (
            one.key.replace("lr_scheduler", "lr_scheduler_type", 1) if one.key == "lr_scheduler" else one.key
        )
        is_given = all(part.partition(".")[0] in config for part in key.split(" and "))
        if is_given or one.kind == "mapped":
            yield replace(one, key=key, is_default=not is_given)


def map_precision(config: Config, usual: str) -> Findings:
    """Map the precision of the forward pass.

    Args:
        config: Config, key -> value.
        usual: Precision without any key.
    """
    on = [key for key in PRECISION if config.get(key) is True]
    chosen = next((key for key in ("bf16", "fp16", "tf32") if key in on), None)
    for key in PRECISION:
        if key not in config:
            continue
        if key == chosen:
            yield mapped(key, "sft.precision", key)
        elif config[key] is True:
            yield not_needed(key, f"sft.precision is {chosen}")
        elif config[key] in (False, None):
            yield not_needed(key, "off")
        else:
            yield unmapped(key, f"{config[key]!r}: choose true or false", "sft.precision")
    if chosen is None:
        value = "fp32" if "bf16" in config and usual == "auto" else usual
        yield default("bf16", "sft.precision", value, "the tool's default")


def _sharding(config: Config, folder: Path) -> Findings:
    if "deepspeed" in config:
        yield from map_deepspeed(config["deepspeed"], folder)
    elif config.get("fsdp") or config.get("fsdp_config"):
        words = str(config.get("fsdp", ""))
        key = "fsdp" if "fsdp" in config else "fsdp_config"
        yield mapped(key, "sft.strategy", "fsdp2", "FSDP2 instead of FSDP1")
        yield default("fsdp", "sft.offload_param", "cpu" if "offload" in words else "none")
        yield default("fsdp", "sft.offload_optimizer", "none")
        if key == "fsdp" and "fsdp_config" in config:
            yield unmapped("fsdp_config", "only sft.strategy and sft.offload_param are set; check them")
    else:
        yield default("deepspeed", "sft.strategy", "auto", "neither DeepSpeed nor FSDP")
        yield from (default("deepspeed", target, "none") for target in TARGETS[1:])


def _evaluation(config: Config, defaults: Mapping[str, Any]) -> Findings:
    """Map when the model is evaluated and saved."""
    target, keys = "sft.eval_steps", [key for key in EVALUATION if key in config]
    strategy = str(config.get("eval_strategy", config.get("evaluation_strategy", "no"))).lower()
    interval: Any = None
    if strategy == "steps":
        steps = config.get("eval_steps", config.get("logging_steps", 500))
        yield convert_value(
            "eval_steps" if "eval_steps" in config else keys[0], target, steps, parse_interval
        )
        interval = steps
    elif strategy == "epoch":
        epochs = config.get("num_train_epochs", defaults["num_train_epochs"])
        yield _each_epoch(keys[0], target, epochs)
    else:
        yield default("eval_strategy", target, None, "no evaluation during training")
    for key in keys:
        if key in ("eval_steps", "do_eval") and interval is None:
            yield not_needed(key, f"eval_strategy is {strategy}")
        elif key != "eval_steps":
            yield not_needed(key, f"sets {target}")
    yield from _saving(config, interval)


def _each_epoch(key: str, target: str, epochs: Any) -> Finding:
    try:
        share = share_of_steps(1, epochs)
    except ValueError as err:
        return unmapped(key, str(err), target)
    return mapped(key, target, share, "once per epoch, as a share of all steps")


def _saving(config: Config, evaluation: Any) -> Findings:
    keys = [key for key in SAVING if key in config]
    if config.get("load_best_model_at_end") is True and evaluation is not None:
        note = "a checkpoint at each evaluation, so that the best model is one of them"
        yield convert_value("save_steps", "sft.save_steps", evaluation, parse_interval, note)
        yield from (not_needed(key, note) for key in keys if key != "save_steps")
        return
    is_counted = str(config.get("save_strategy", "steps")) == "steps" and "save_steps" in config
    if is_counted:
        yield convert_value("save_steps", "sft.save_steps", config["save_steps"], parse_interval)
    for key in keys:
        if not (is_counted and key == "save_steps"):
            yield not_needed(key, "the result is always saved; checkpoints are only for resuming")


@dataclass(frozen=True, slots=True)
class Tool:
    """The keys of a tool, and what becomes of those that no function maps.

    Attributes:
        title: Name of the tool.
        names: Names of all its keys.
        grouped: Keys that its functions map.
        not_needed: Pattern of keys -> why they are not needed.
        remedies: Pattern of keys -> why they cannot be mapped, and what to do.
        necessary: Patterns of keys of another base, other data or another objective.
    """

    title: str
    names: frozenset[str]
    grouped: Set[str]
    not_needed: Mapping[str, str]
    remedies: Mapping[str, str]
    necessary: tuple[str, ...]


def translate(config: Config, tool: Tool, decide: Callable[[Config], Iterable[Finding]]) -> list[Finding]:
    """Return the findings for every key of a config.

    Args:
        config: Config, key -> value.
        tool: Tool of the config.
        decide: Function from the keys with a value to the findings for those that are mapped.
    """
    given, empty = split_empty(config)
    found = [*decide(given)]
    decided = tool.grouped | DIRECT.keys()
    found += [map_alone(key, value, tool) for key, value in given.items() if key not in decided]
    found = fit(finish(given, found), values_of)
    if empty:
        found.append(not_needed(", ".join(empty), "empty: the default applies"))
    return found


def map_model(config: Config, revision: str, hub: Lookup) -> Finding:
    """Return the finding for the base model.

    Args:
        config: Config, key -> value.
        revision: Commit, branch or tag; empty for the newest commit.
        hub: Where commits are looked up.
    """
    key = "model_name_or_path" + (" and model_revision" if "model_revision" in config else "")
    return map_base(key, str(config.get("model_name_or_path", "")), revision, hub)


def map_alone(key: str, value: Any, tool: Tool) -> Finding:
    """Return the finding for a key that nothing maps."""
    if why := match(key, {**NOT_NEEDED, **tool.not_needed}):
        return not_needed(key, why)
    remedy = match(key, {**UNMAPPED, **tool.remedies})
    if remedy is None and key not in tool.names:
        return unknown(key, tool.title, tool.names)
    if value is False or value == 0:
        return not_needed(key, "off, as in Nightshift")
    remedy = remedy or "has no counterpart; remove it"
    is_essential = any(fnmatchcase(key, name) for name in (*ESSENTIAL, *tool.necessary))
    return essential(key, remedy) if is_essential else unmapped(key, remedy)
