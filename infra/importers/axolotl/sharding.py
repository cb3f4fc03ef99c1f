"""Map DeepSpeed configs and FSDP options to a distributed training strategy."""

import re
from pathlib import Path
from typing import Any

from infra.importers.deepspeed import TARGETS, map_deepspeed
from infra.importers.findings import (
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

SHARDING_KEYS = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type")
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


def map_sharding(config: Config, folder: Path) -> Findings:
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
        yield from map_deepspeed(deepspeed, folder)
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


def _fsdp(config: Config) -> Findings:
    options = config.get("fsdp_config") or {}
    words = config.get("fsdp") or []
    words = words if isinstance(words, list) else str(words).split()
    if not isinstance(options, dict):
        yield unmapped("fsdp_config", f"{options!r} is not a mapping; set sft.strategy", "sft.strategy")
        options = {}
    options = {re.sub("^fsdp_", "", str(key)): value for key, value in options.items()}
    sharding = str(options.get("sharding_strategy", "FULL_SHARD"))
    is_old = config.get("fsdp_version", options.get("version", 1)) != 2
    key = "fsdp" if "fsdp" in config else "fsdp_config"
    if sharding in SHARDING:
        note = "FSDP2 instead of FSDP1" if is_old and sharding == "FULL_SHARD" else ""
        yield mapped(key, "sft.strategy", SHARDING[sharding], note)
    else:
        yield unmapped(
            "fsdp_config.sharding_strategy",
            f"{sharding}: set sft.strategy to fsdp2, zero2 or zero3",
            "sft.strategy",
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
        # With FSDP, Axolotl ignores gradient_checkpointing: the wrapped blocks decide.
        return not_needed(key, "read with gradient_checkpointing")
    return unmapped(key, f"unknown; {suggestion(name, list(FSDP_KEYS))}")
