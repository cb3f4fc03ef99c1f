"""Map DeepSpeed configs and FSDP options to a distributed training strategy."""

import json
import re
from pathlib import Path
from typing import Any

from infra.importers.axolotl.findings import (
    Config,
    Finding,
    Findings,
    contradiction,
    default,
    mapped,
    not_needed,
    unmapped,
)
from nightshift.core.config import suggestion

MEMORY_KEYS = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type")
TARGETS = ("sft.strategy", "sft.offload_optimizer", "sft.offload_param")
# DeepSpeed configs that Axolotl ships -> strategy, device of the optimizer state, device of the weights.
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
}
# Options of FSDP1 and FSDP2 that are constant here, or that FSDP2 does not offer.
FSDP_CONSTANT = (
    *("limit_all_gathers", "sync_module_states", "use_orig_params", "cpu_ram_efficient_loading"),
    *("auto_wrap_policy", "transformer_layer_cls_to_wrap", "state_dict_type", "final_state_dict_type"),
    *("backward_prefetch", "forward_prefetch", "mixed_precision_policy", "cpu_offload_pin_memory", "version"),
)
FSDP_KEYS = (
    *FSDP_CONSTANT,
    "offload_params",
    "sharding_strategy",
    "reshard_after_forward",
    "activation_checkpointing",
)
SHARDING = {"FULL_SHARD": "fsdp2", "NO_SHARD": "ddp", "SHARD_GRAD_OP": "zero2"}


def map_memory(config: Config, folder: Path) -> Findings:
    """Map the distributed strategy and offloading.

    Args:
        config: Axolotl config, key -> value.
        folder: Folder of the Axolotl file, searched for DeepSpeed configs before the current folder.
    """
    deepspeed, is_fsdp = config.get("deepspeed"), "fsdp" in config or "fsdp_config" in config
    if deepspeed is not None and is_fsdp:
        other = "fsdp" if "fsdp" in config else "fsdp_config"
        yield contradiction("deepspeed", other, "choose one of the two")
    elif deepspeed is not None:
        yield from _deepspeed(deepspeed, folder)
    elif is_fsdp:
        yield from _fsdp(config)
    else:
        yield default("deepspeed", "sft.strategy", "auto", "neither DeepSpeed nor FSDP: ddp, or one process")
        yield from (default("deepspeed", target, "none", "nothing is offloaded") for target in TARGETS[1:])
    for key in ("fsdp_version", "fsdp_final_state_dict_type"):
        if key in config:
            yield not_needed(
                key, "FSDP2 is always used and saves full weights" if is_fsdp else "fsdp is not set"
            )


def _deepspeed(value: Any, folder: Path) -> Findings:
    name = Path(value).name if isinstance(value, str) else ""
    try:
        content = value if isinstance(value, dict) else _read(str(value), folder)
    except (OSError, ValueError) as err:
        yield unmapped("deepspeed", f"{value}: cannot be read ({err}); set {', '.join(TARGETS)}")
        return
    if content is not None:
        yield from _zero(content)
    elif name in SHIPPED:
        yield from _three(*SHIPPED[name])
        yield default("deepspeed", "sft.nvme_path", None, "no NVMe offloading")
    else:
        remedy = suggestion(name, list(SHIPPED))
        yield unmapped(
            "deepspeed", f"{value}: no such file, and Axolotl ships none; {remedy} Or set {TARGETS[0]}"
        )
        return
    if "torch_compile" in name:
        yield mapped("deepspeed", "sft.torch_compile", value=True, note="from the file name")


def _read(name: str, folder: Path) -> dict[str, Any] | None:
    """Return the content of a DeepSpeed config, or None if the file does not exist."""
    for path in (folder / name, Path(name)):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return None


def _zero(content: dict[str, Any]) -> Findings:
    section = content.get("zero_optimization") or {}
    devices = []
    path = None
    for key in ("offload_optimizer", "offload_param"):
        part = section.get(key) or {}
        devices.append(str(part.get("device", "none")))
        path = path or part.get("nvme_path")
    yield from _three(f"zero{section.get('stage', 0)}", *devices)
    yield mapped("deepspeed", "sft.nvme_path", path)


def _three(*values: str) -> Findings:
    note = "buckets and precision are set automatically"
    yield from (
        mapped("deepspeed", target, value, note) for target, value in zip(TARGETS, values, strict=True)
    )


def _fsdp(config: Config) -> Findings:
    options = config.get("fsdp_config") or {}
    words = config.get("fsdp") or []
    words = words if isinstance(words, list) else str(words).split()
    options = (
        {re.sub("^fsdp_", "", key): value for key, value in options.items()}
        if isinstance(options, dict)
        else {}
    )
    sharding = str(options.get("sharding_strategy", "FULL_SHARD"))
    is_old = config.get("fsdp_version", options.get("version", 1)) != 2
    key = "fsdp" if "fsdp" in config else "fsdp_config"
    if sharding in SHARDING:
        note = "FSDP2 instead of FSDP1" if is_old and sharding == "FULL_SHARD" else ""
        yield mapped(key, "sft.strategy", SHARDING[sharding], note)
    else:
        yield unmapped(
            "fsdp_config.sharding_strategy", f"{sharding}: set sft.strategy to fsdp2, zero2 or zero3"
        )
    is_offloaded = bool(options.get("offload_params")) or "offload" in words
    yield mapped("fsdp_config.offload_params", "sft.offload_param", "cpu" if is_offloaded else "none")
    yield default("fsdp", "sft.offload_optimizer", "none", "FSDP2 keeps the optimizer state with the weights")
    yield from (_fsdp_option(name, value) for name, value in options.items() if name not in _READ)


_READ = ("offload_params", "sharding_strategy")


def _fsdp_option(name: str, value: Any) -> Finding:
    key = f"fsdp_config.{name}"
    if name in FSDP_CONSTANT or (name == "reshard_after_forward" and value is True):
        return not_needed(key, "set automatically")
    if name == "reshard_after_forward":
        return unmapped(key, "weights are always resharded after the forward pass; use zero2 to keep them")
    if name == "activation_checkpointing":
        if value:
            return mapped(key, "sft.activation_checkpointing", value=True)
        return not_needed(key, "off")
    return unmapped(key, f"unknown; {suggestion(name, list(FSDP_KEYS))}")
