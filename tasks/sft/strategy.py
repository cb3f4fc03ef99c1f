"""Choice of the distributed strategy, and the config generated for DeepSpeed or FSDP2.

The config is generated from typed parameters. Optimizer and scheduler stay in transformers, so no
DeepSpeed config can silently replace them.
"""

import re
from collections.abc import Mapping
from typing import Any

from nightshift.core.errors import ConfigError
from tasks.sft import SftParams

GIB = 2**30
HALF = ("bf16", "fp16")
# Elements of DeepSpeed's gradient bucket, which it allocates at once: a tenth of the default, which is
# meant for full fine-tuning.
BUCKET = 50_000_000
# Bytes of fp32 logits per chunk of the chunked loss: enough to saturate a GPU, and few enough to fit
# into the caches of a CPU.
LOGITS = {"cuda": 2**29, "cpu": 2**26}
ZERO = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
# Bytes and threads of asynchronous I/O: DeepSpeed's own example for one NVMe disk.
AIO = {
    "block_size": 1048576,
    "queue_depth": 8,
    "thread_count": 1,
    "single_submit": False,
    "overlap_events": True,
}


def choose_strategy(
    params: SftParams, needs: Mapping[str, int] | None = None, capacity: int | None = None
) -> tuple[str, str]:
    """Return the strategy and the reason for it.

    `auto` takes the simplest one: sharding only slows down what fits on one device.

    Args:
        params: `sft` section of params.yaml.
        needs: Strategy -> bytes per device, or None if unknown.
        capacity: Bytes of device memory, or None if the device has no separate memory.

    Raises:
        ConfigError: `auto`, and no strategy fits.
    """
    if params.strategy == "ddp" and params.ranks == 1:
        return "single", "ddp with one process is single"
    if params.strategy != "auto":
        return params.strategy, "set in params.yaml"
    several = params.ranks > 1
    if needs is None or capacity is None:
        if several:
            return "ddp", f"{params.ranks} processes, each with the whole model"
        return "single", "one process"
    # Sharded weights cannot be in float8.
    last = () if params.fp8_base else ("fsdp2" if params.adapter == "qlora" else "zero3",)
    ladder = ("ddp", "zero1", "zero2", *last) if several else ("single",)
    sizes = {name: f"{needs[name] / GIB:.1f} GiB of {capacity / GIB:.1f} GiB" for name in ladder}
    for before, name in zip(("", *ladder), ladder, strict=False):
        if needs[name] <= capacity:
            why = f"{before} takes {sizes[before]}" if before else "sharding would only slow it down"
            return name, f"{name}: {sizes[name]}; {why}"
    raise ConfigError(
        f"params.yaml: sft.strategy=auto: {ladder[-1]} takes {sizes[ladder[-1]]}; set "
        "activation_checkpointing: true, more num_processes, or strategy: zero3 with offload_optimizer: cpu"
    )


def keeps_half(params: SftParams, strategy: str, precision: str) -> bool:
    """Return whether weights are stored in half precision.

    This is enough for frozen weights, and where ZeRO keeps full-precision copies of the trained weights.
    """
    return precision in HALF and (params.adapter is not None or strategy in ZERO)


def uses_autocast(strategy: str, precision: str) -> bool:
    """Return whether autocast is used; ZeRO casts the whole model to half precision instead."""
    return precision in HALF and strategy not in ZERO


def choose_loss(params: SftParams, precision: str, head: str | None) -> str:
    """Choose how the loss is computed: in chunks from the hidden states, or from all logits at once.

    The chunked loss computes its own gradient, so the head must not train. That gradient is unscaled,
    which fp16 cannot represent, and torch.compile cannot trace it.

    Args:
        params: `sft` section of params.yaml.
        precision: bf16, fp16, tf32 or fp32.
        head: Name of the module whose output the model returns as logits, or None if it changes them.
    """
    trains = params.adapter is None or bool(params.lora_modules_to_save) or is_target(params, head)
    is_plain = head is not None and not trains and precision != "fp16" and not params.torch_compile
    return "chunked" if is_plain else "logits"


def is_target(params: SftParams, module: str | None) -> bool:
    """Return whether a module outside the blocks, such as the head, gets an adapter."""
    targets = params.lora_target_modules
    if isinstance(targets, list):
        return module in targets
    return targets != "all-linear" and module is not None and re.fullmatch(targets, module) is not None


def choose_lora(params: SftParams, strategy: str) -> str | None:
    """Choose how the adapter layers are computed: fused, or as in PEFT; None without an adapter.

    The fused function bypasses the module hooks with which ZeRO-3 and FSDP2 gather weights.
    """
    if params.adapter is None:
        return None
    is_plain = params.adapter == "lora" and not params.lora_dropout and not params.use_dora
    is_whole = strategy not in ("zero3", "fsdp2") and not params.torch_compile
    return "fused" if is_plain and is_whole else "peft"


def deepspeed_config(
    params: SftParams, strategy: str, precision: str, micro_batch_size: int, device: str
) -> dict[str, Any] | None:
    """Generate the DeepSpeed config, or None for a strategy without DeepSpeed."""
    if strategy not in ZERO:
        return None
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": params.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": _zero(params, ZERO[strategy], device),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": params.offload_optimizer != "none",
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
        **({"aio": AIO} if "nvme" in (params.offload_optimizer, params.offload_param) else {}),
    }


def fsdp_config(params: SftParams, strategy: str) -> dict[str, Any] | None:
    """Generate the FSDP2 config, or None for another strategy."""
    if strategy != "fsdp2":
        return None
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_offload": params.offload_param == "cpu",
    }


def _zero(params: SftParams, stage: int, device: str) -> dict[str, Any]:
    """Generate the ZeRO section of the DeepSpeed config."""
    section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        # Saving needs the full weights.
        section |= {"stage3_gather_16bit_weights_on_model_save": True}
    for key, target in (
        ("offload_optimizer", params.offload_optimizer),
        ("offload_param", params.offload_param),
    ):
        if target != "none":
            # From unpinned memory a GPU copies at half the speed.
            section[key] = {"device": target, "pin_memory": device == "cuda"}
            if target == "nvme":
                section[key]["nvme_path"] = params.nvme_path
    return section
