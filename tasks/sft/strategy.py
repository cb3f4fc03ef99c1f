"""How the ranks share the work: the choice, and the configuration that DeepSpeed or FSDP2 gets.

All of it is generated from typed parameters; optimiser and scheduler stay with transformers, so that no
configuration of DeepSpeed's can replace them in silence.
"""

from collections.abc import Mapping
from typing import Any

from nightshift.core.errors import ConfigError
from tasks.sft import SftParams

GIB = 2**30
HALF = ("bf16", "fp16")
# Elements of DeepSpeed's bucket of gradients, which it allocates at once: a tenth of its default, which is
# made for models that train whole.
BUCKET = 50_000_000
# Bytes of logits in full precision that exist at a time where the loss is computed in chunks: on a GPU a
# product large enough to use it whole, on a processor one that its caches still serve.
LOGITS = {"cuda": 2**29, "cpu": 2**26}
ZERO = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
# Bytes and threads of the asynchronous reads and writes: DeepSpeed's own example for one NVMe disk.
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

    `auto` takes the simplest: what fits on one device only gets slower by dividing it.

    Args:
        params: The section sft.
        needs: Strategy -> bytes that it takes on each device, or None if they are not known.
        capacity: Bytes of a device's memory, or None if it has none of its own.

    Raises:
        ConfigError: auto, and nothing fits.
    """
    if params.strategy == "ddp" and params.ranks == 1:
        return "single", "ddp with one process is single"
    if params.strategy != "auto":
        return params.strategy, "as params.yaml asks"
    several = params.ranks > 1
    if needs is None or capacity is None:
        if several:
            return "ddp", f"{params.ranks} processes, each with the whole model"
        return "single", "one process"
    # Divided weights cannot be in float8.
    last = () if params.fp8_base else ("fsdp2" if params.adapter == "qlora" else "zero3",)
    ladder = ("ddp", "zero1", "zero2", *last) if several else ("single",)
    said = {name: f"{needs[name] / GIB:.1f} GiB of {capacity / GIB:.1f} GiB" for name in ladder}
    for before, name in zip(("", *ladder), ladder, strict=False):
        if needs[name] <= capacity:
            why = f"{before} takes {said[before]}" if before else "dividing would only slow it down"
            return name, f"{name}: {said[name]}; {why}"
    raise ConfigError(
        f"params.yaml: sft.strategy=auto: {ladder[-1]} takes {said[ladder[-1]]}; set "
        "activation_checkpointing: true, more num_processes, or strategy: zero3 with offload_optimizer: cpu"
    )


def keeps_half(params: SftParams, strategy: str, precision: str) -> bool:
    """Tell whether weights are stored in half precision.

    That is enough for frozen weights, and where ZeRO keeps full-precision copies of those that train.
    """
    return precision in HALF and (params.adapter is not None or strategy in ZERO)


def uses_autocast(strategy: str, precision: str) -> bool:
    """Tell whether operators cast their inputs to half precision; ZeRO's whole model is in it instead."""
    return precision in HALF and strategy not in ZERO


def choose_loss(params: SftParams, precision: str, head: str | None) -> str:
    """Choose how the loss is computed: in chunks from hidden states, or from all logits at once.

    In chunks it makes its own gradient, so the head must not train; unscaled, as fp16 cannot hold it; and a
    compiler would not see through it.

    Args:
        params: The section sft.
        precision: bf16, fp16, tf32 or fp32.
        head: Name of the module whose output the model returns as logits, or None if it changes them.
    """
    trains = params.adapter is None or head in params.lora_target_modules
    is_plain = head is not None and not trains and precision != "fp16" and not params.torch_compile
    return "chunked" if is_plain else "logits"


def choose_lora(params: SftParams, strategy: str) -> str | None:
    """Choose how the adapter's layers compute: each as one function, or as PEFT does; None without one.

    One function reads the weights without the modules' hooks, by which ZeRO-3 and FSDP2 gather them.
    """
    if params.adapter is None:
        return None
    is_plain = params.adapter == "lora" and not params.lora_dropout and not params.use_dora
    is_whole = strategy not in ("zero3", "fsdp2") and not params.torch_compile
    return "fused" if is_plain and is_whole else "peft"


def deepspeed_config(
    params: SftParams, strategy: str, precision: str, micro_batch_size: int, device: str
) -> dict[str, Any] | None:
    """Generate DeepSpeed's configuration; None for a strategy without it."""
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
    """Generate the configuration of FSDP2; None for another strategy."""
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
    """Generate the section of ZeRO."""
    section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        # Every rank sees the whole weights when they are saved.
        section |= {"stage3_gather_16bit_weights_on_model_save": True}
    for key, target in (
        ("offload_optimizer", params.offload_optimizer),
        ("offload_param", params.offload_param),
    ):
        if target != "none":
            # From other memory a GPU copies at half the speed.
            section[key] = {"device": target, "pin_memory": device == "cuda"}
            if target == "nvme":
                section[key]["nvme_path"] = params.nvme_path
    return section
