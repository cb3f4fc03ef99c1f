"""Read a DeepSpeed config as a whole: each key is mapped, set automatically, or reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.importers.findings import (
    Finding,
    Findings,
    convert_value,
    default,
    mapped,
    not_needed,
    parse_float,
    parse_int,
    unmapped,
)
from nightshift.core.config import suggestion

TARGETS = ("sft.strategy", "sft.offload_optimizer", "sft.offload_param")
# Configs that Axolotl and LLaMA-Factory ship -> strategy, device of the optimizer state and of the weights.
SHIPPED = {
    "zero1.json": ("zero1", "none", "none"),
    "zero1_torch_compile.json": ("zero1", "none", "none"),
    "zero2.json": ("zero2", "none", "none"),
    "zero2_torch_compile.json": ("zero2", "none", "none"),
    "zero3.json": ("zero3", "none", "none"),
    "zero3_bf16.json": ("zero3", "none", "none"),
    "zero3_bf16_cpuoffload_all.json": ("zero3", "cpu", "cpu"),
    "zero3_bf16_cpuoffload_params.json": ("zero3", "none", "cpu"),
    "zero3_cpuoffload.json": ("zero3", "cpu", "cpu"),
    "ds_z0_config.json": ("zero0", "none", "none"),
    "ds_z2_config.json": ("zero2", "none", "none"),
    "ds_z2_offload_config.json": ("zero2", "cpu", "none"),
    "ds_z3_config.json": ("zero3", "none", "none"),
    "ds_z3_offload_config.json": ("zero3", "cpu", "cpu"),
}
# Options that affect only speed and memory, or repeat what the training run reports.
_ZERO_SPEED = """
    overlap_comm contiguous_gradients sub_group_size reduce_bucket_size allgather_partitions
    allgather_bucket_size reduce_scatter stage3_prefetch_bucket_size stage3_param_persistence_threshold
    stage3_max_live_parameters stage3_max_reuse_distance round_robin_gradients
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    zero_hpz_partition_size cpu_offload_params ignore_unused_parameters max_reuse_distance
    max_live_parameters gather_16bit_weights_on_model_save
"""
ZERO_SPEED = frozenset(_ZERO_SPEED.split())
_SPEED = """
    wall_clock_breakdown steps_per_print zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    prescale_gradients gradient_predivide_factor communication_data_type aio flops_profiler
    activation_checkpointing train_batch_size csv_monitor tensorboard wandb comms_logger dump_state
    monitor_config comms_config _comment verbose tag
"""
SPEED = frozenset(_SPEED.split())
NUMBERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "gradient_clipping": ("sft.max_grad_norm", parse_float),
    "gradient_accumulation_steps": ("sft.gradient_accumulation_steps", parse_int),
    "train_micro_batch_size_per_gpu": ("sft.per_device_train_batch_size", parse_int),
}
NOTE = "buckets and precision are set automatically"


def map_deepspeed(value: Any, folder: Path) -> Findings:
    """Map a DeepSpeed config: a mapping, a file, or the name of a config that a tool ships.

    Args:
        value: Mapping, or name of a file.
        folder: Folder of the config file, searched before the current folder.
    """
    name = Path(value).name if isinstance(value, str) else ""
    try:
        content = value if isinstance(value, dict) else _read(str(value), folder)
    except (OSError, ValueError) as err:
        yield unmapped("deepspeed", f"{value}: cannot be read ({err}); set {TARGETS[0]}", TARGETS[0])
        return
    if content is not None:
        yield from _content(content)
    elif name in SHIPPED:
        yield from _targets(*SHIPPED[name])
        yield default("deepspeed", "sft.nvme_path", None, "no NVMe offloading")
    else:
        remedy = suggestion(name, list(SHIPPED))
        yield unmapped(
            "deepspeed",
            f"{value}: no such file, and no tool ships it; {remedy} Or set {TARGETS[0]}",
            TARGETS[0],
        )
        return
    if "torch_compile" in name:
        yield mapped("deepspeed", "sft.torch_compile", value=True, note="from the file name")


def _read(name: str, folder: Path) -> dict[str, Any] | None:
    """Return the content of a DeepSpeed config, or None if the file does not exist.

    Raises:
        ValueError: It is not a JSON object.
    """
    for path in (folder / name, Path(name)):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
            return content
    return None


def _content(content: dict[str, Any]) -> Findings:
    """Yield the findings for a config, the whole of which is given."""
    section = content.get("zero_optimization", {})
    if not isinstance(section, dict):
        yield unmapped("deepspeed", f"zero_optimization: {section!r} is not a mapping; set {TARGETS[0]}")
        section = {}
    yield from _zero(section)
    for key, value in content.items():
        if key != "zero_optimization":
            yield from _option(key, value)


def _zero(section: dict[str, Any]) -> Findings:
    devices, path = [], None
    for key in ("offload_optimizer", "offload_param"):
        part = section.get(key) or {}
        where = f"deepspeed.zero_optimization.{key}"
        if not isinstance(part, dict):
            yield unmapped(where, f"{part!r} is not a mapping; set sft.{key}", f"sft.{key}")
            part = {}
        devices.append(str(part.get("device", "none")))
        path = path or part.get("nvme_path")
        yield from (
            not_needed(f"{where}.{name}", "set automatically")
            for name in part
            if name not in ("device", "nvme_path")
        )
    stage = section.get("stage", 0)
    if stage in (0, 1, 2, 3) and not isinstance(stage, bool):
        yield from _targets(f"zero{stage}", *devices)
    else:
        yield unmapped("deepspeed", f"stage {stage!r} is unknown; set {TARGETS[0]}", TARGETS[0])
    yield mapped("deepspeed", "sft.nvme_path", path)
    for key, value in section.items():
        where = f"deepspeed.zero_optimization.{key}"
        if key in ZERO_SPEED or value in (False, None):
            yield not_needed(where, "set automatically")
        elif key == "cpu_offload":
            yield unmapped(where, "an old name; set sft.offload_optimizer", "sft.offload_optimizer")
        elif key not in ("stage", "offload_optimizer", "offload_param"):
            yield unmapped(where, "DeepSpeed's default holds; remove it")


def _option(key: str, value: Any) -> Findings:
    """Yield the finding for a key outside zero_optimization."""
    where = f"deepspeed.{key}"
    is_on = value.get("enabled") if isinstance(value, dict) else value
    if key in ("bf16", "fp16", "bfloat16"):
        yield _precision(where, key, is_on)
    elif key in NUMBERS and value != "auto":
        yield convert_value(where, NUMBERS[key][0], value, NUMBERS[key][1])
    elif key in NUMBERS or key in SPEED or value in ("auto", None) or is_on is False:
        yield not_needed(where, "set automatically")
    elif key == "compile":
        is_disabled = isinstance(value, dict) and value.get("disable", True)
        yield (
            not_needed(where, "off")
            if is_disabled
            else unmapped(where, "set sft.torch_compile", "sft.torch_compile")
        )
    elif key in ("optimizer", "scheduler"):
        target = "sft.optim" if key == "optimizer" else "sft.lr_scheduler_type"
        yield unmapped(where, f"set {target}: DeepSpeed's own {key} is never used", target)
    else:
        yield unmapped(where, "has no counterpart; remove it")


def _precision(where: str, key: str, is_on: Any) -> Finding:
    if is_on is True:
        return mapped(where, "sft.precision", "fp16" if key == "fp16" else "bf16")
    return not_needed(where, "set by the precision of the training run" if is_on == "auto" else "off")


def _targets(*values: str) -> Findings:
    yield from (
        mapped("deepspeed", target, value, NOTE) for target, value in zip(TARGETS, values, strict=True)
    )
