"""What this machine can run: device, precision, attention kernel, strategy, each chosen once and recorded."""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError
from tasks.sft import SftParams
from tasks.sft.conflicts import EIGHT_BIT
from tasks.sft.memory import Batch, estimate_all, totals
from tasks.sft.strategy import choose_strategy

# What `auto` tries, the fastest first; a kernel has to run and to keep packed examples apart.
ATTENTION = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "flex_attention", "sdpa", "eager")
BITSANDBYTES = (*EIGHT_BIT, "lion_32bit")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice.

    Attributes:
        device: cuda or cpu.
        precision: bf16, fp16, tf32 or fp32.
        attention: Name of the kernel.
        strategy: How the ranks share the work.
        reason: Why that strategy.
    """

    device: str
    precision: str
    attention: str
    strategy: str
    reason: str


def choose_backend(
    params: SftParams, config: Mapping[str, Any] | None = None, batch: Batch | None = None
) -> Backend:
    """Choose, or check what was asked for.

    Args:
        params: The section sft.
        config: The model's config.json, and
        batch: the largest micro-batch: by these `strategy: auto` takes what fits; None takes no notice.

    Raises:
        ConfigError: This machine cannot do it.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if missing := find_missing(params, device):
        raise ConfigError("\n  ".join(["params.yaml: this machine cannot do what sft asks for", *missing]))
    precision = choose_precision(params.precision, device)
    attention = choose_attention(params.attn_implementation, device, precision)
    needs, capacity = None, None
    if params.strategy == "auto" and device == "cuda" and config and batch:
        known = params.model_copy(update={"attn_implementation": attention})
        needs = totals(estimate_all(config, known, precision, batch, device))
        capacity = torch.cuda.get_device_properties(0).total_memory
    strategy, reason = choose_strategy(params, needs, capacity)
    return Backend(device, precision, attention, strategy, reason)


def find_missing(params: SftParams, device: str) -> list[str]:
    """List what was asked for and needs a package or a GPU that is not there, each with the remedy.

    Args:
        params: The section sft.
        device: cuda or cpu.
    """
    # What -> (asked for, package, whether it needs a GPU).
    needs = {
        "adapter=qlora": (params.adapter == "qlora", "bitsandbytes", False),
        f"optim={params.optim}": (params.optim in BITSANDBYTES, "bitsandbytes", True),
        "optim=schedule_free_adamw": (params.optim == "schedule_free_adamw", "schedulefree", False),
        "use_liger_kernel=true": (params.use_liger_kernel, "liger_kernel", True),
    }
    found = []
    for what, (is_asked, package, needs_gpu) in needs.items():
        if is_asked and importlib.util.find_spec(package) is None:
            found.append(f"sft.{what} needs {package}; run `pip install -e '.[gpu]'`")
        elif is_asked and needs_gpu and device == "cpu":
            found.append(f"sft.{what} needs a GPU; take another value")
    return found


def choose_precision(requested: str, device: str) -> str:
    """Choose the arithmetic, or check that this machine has it.

    Raises:
        ConfigError: It has not.
    """
    import torch

    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        has_tf32 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        has_bf16, has_tf32 = processor_has_bf16(), False
    missing = {"bf16": not has_bf16, "tf32": not has_tf32, "fp16": device == "cpu"}
    if missing.get(requested):
        raise ConfigError(
            f"params.yaml: sft.precision={requested}, but this machine's {device} has no {requested} "
            "arithmetic; set auto or fp32"
        )
    if requested == "auto":
        return "bf16" if has_bf16 else "fp32"
    return requested


def processor_has_bf16() -> bool:
    """Tell from its flags whether the processor computes in bf16."""
    return "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def choose_attention(requested: str, device: str, precision: str) -> str:
    """Choose the first attention kernel that runs, or check the one that was asked for.

    Raises:
        ConfigError: It does not run here, or it lets packed examples see each other.
    """
    from tasks.sft.probe import probe_attention

    if requested != "auto":
        if fault := probe_attention(requested, device, precision):
            raise ConfigError(
                f"params.yaml: sft.attn_implementation={requested} does not work on this machine: {fault}; "
                "set auto"
            )
        return requested
    for name in ATTENTION if device == "cuda" else ATTENTION[-2:]:
        if not (fault := probe_attention(name, device, precision)):
            return name
        log.info("attention %s: %s; trying the next", name, fault)
    raise ConfigError("params.yaml: sft.attn_implementation=auto: no kernel runs on this machine")
