"""How a training runs on this machine: processes, devices, precision, kernel, strategy; each chosen once."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.core.errors import ConfigError
from tasks.sft import SftParams
from tasks.sft.machine import VISIBLE, Machine
from tasks.sft.memory import Batch, estimate_all, totals
from tasks.sft.strategy import GIB, choose_lora, choose_loss, choose_strategy

# Below this memory, in bytes, a second process would leave no room for the model.
ROOM_FOR_TWO = 4 * GIB
# A line of DeepSpeed's hostfile.
HOST = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)\s*(#.*)?")


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice.

    Attributes:
        device: cuda or cpu.
        devices: The GPUs of this machine's ranks, as CUDA_VISIBLE_DEVICES names them; none on the processor.
        num_processes: Ranks, of all machines together.
        precision: bf16, fp16, tf32 or fp32.
        attention: Name of the kernel.
        strategy: How the ranks share the work.
        reason: Why that strategy.
        loss: How the loss is computed: chunked or logits.
        lora: How the adapter's layers compute: fused or peft; None without an adapter.
        activation_checkpointing: Activations are computed again instead of kept.
        use_liger_kernel: Liger's kernels are used.
    """

    device: str
    devices: tuple[str, ...]
    num_processes: int
    precision: str
    attention: str
    strategy: str
    reason: str
    loss: str
    lora: str | None
    activation_checkpointing: bool
    use_liger_kernel: bool


def with_processes(params: SftParams, gpus: int) -> SftParams:
    """Return the parameters with the number of processes in the place of `auto`.

    Args:
        params: The section sft.
        gpus: Visible GPUs of this machine.

    Raises:
        ConfigError: The number does not fit this machine, or the machines of the hostfile.
    """
    number = params.num_processes
    if params.hostfile is not None:
        slots = sum(read_hostfile(Path(params.hostfile)).values())
        names = os.environ.get(VISIBLE, "").split(",")
        if VISIBLE in os.environ and names != [str(i) for i in range(len(names))]:
            raise ConfigError(
                f"{VISIBLE}={os.environ[VISIBLE]}, but DeepSpeed takes the first GPUs of each machine of "
                f"{params.hostfile}; unset it, or set sft.hostfile to null"
            )
        if number not in ("auto", slots):
            raise ConfigError(
                f"params.yaml: sft.num_processes={number}, but {params.hostfile} has {slots} slots; set auto"
            )
        number = slots
    elif params.strategy == "single":
        number = 1
    elif number == "auto":
        number = gpus or (2 if processor_memory() >= ROOM_FOR_TWO else 1)
    elif gpus and number > gpus:
        seen = f"{VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else "this machine"
        raise ConfigError(
            f"params.yaml: sft.num_processes={number}, but {seen} has {gpus} GPUs; set auto, or {gpus}"
        )
    return params.model_copy(update={"num_processes": number})


def read_hostfile(path: Path) -> dict[str, int]:
    """Read DeepSpeed's list of machines: name -> slots.

    Raises:
        ConfigError: It is not there, or a line is none of `name slots=n`.
    """
    if not path.is_file():
        raise ConfigError(f"params.yaml: sft.hostfile={path}: not found; write it, or set null")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = HOST.fullmatch(line.strip())
        if not found or found["name"] in hosts:
            raise ConfigError(f"{path}:{number}: {line!r}: must be `name slots=n`, each name once")
        hosts[found["name"]] = int(found["slots"])
    return hosts


def processor_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    limit = Path("/sys/fs/cgroup/memory.max")
    granted = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed if granted == "max" else min(installed, int(granted))


def choose_backend(
    params: SftParams, machine: Machine, config: Mapping[str, Any] | None = None, batch: Batch | None = None
) -> Backend:
    """Choose the strategy, and what else params.yaml leaves open; take the rest from the machine.

    Args:
        params: The section sft, `with_processes`.
        machine: What was found.
        config: The model's config.json, and
        batch: the largest micro-batch: by these `auto` takes what fits; None takes no notice.

    Raises:
        ConfigError: Nothing fits.
    """
    liger = params.use_liger_kernel
    update = {
        "attn_implementation": machine.attention,
        "use_liger_kernel": machine.has_liger and not params.torch_compile if liger == "auto" else liger,
    }
    strategy, reason, checkpointing = fit(params.model_copy(update=update), machine, config, batch)
    return Backend(
        device=machine.device,
        devices=machine.devices[: params.ranks],
        num_processes=params.ranks,
        precision=machine.precision,
        attention=machine.attention,
        strategy=strategy,
        reason=reason,
        loss=choose_loss(params, machine.precision, machine.head),
        lora=choose_lora(params, strategy),
        activation_checkpointing=checkpointing,
        use_liger_kernel=bool(update["use_liger_kernel"]),
    )


def fit(
    params: SftParams, machine: Machine, config: Mapping[str, Any] | None, batch: Batch | None
) -> tuple[str, str, bool]:
    """Choose the strategy, its reason, and whether activations are computed again; see `choose_backend`.

    `auto` keeps the activations if any strategy then fits.

    Raises:
        ConfigError: Nothing fits.
    """
    asked = params.activation_checkpointing
    options = (False, True) if asked == "auto" else (asked,)
    for option in options:
        known = params.model_copy(update={"activation_checkpointing": option})
        needs = memory_needs(known, machine, config, batch)
        is_last = option == options[-1] or needs is None
        try:
            strategy, reason = choose_strategy(known, needs, machine.memory)
        except ConfigError:
            if is_last:
                raise
            continue
        if is_last or fits(strategy, needs, machine.memory):
            break
    return strategy, reason, option


def fits(strategy: str, needs: Mapping[str, int] | None, memory: int | None) -> bool:
    """Tell whether a strategy fits into a device's memory, as far as both are known."""
    return needs is None or memory is None or needs[strategy] <= memory


def memory_needs(
    params: SftParams, machine: Machine, config: Mapping[str, Any] | None, batch: Batch | None
) -> dict[str, int] | None:
    """Return strategy -> bytes on each GPU; None on a processor, and where it need not be known.

    Raises:
        ConfigError: `strategy: auto`, and the memory of such a model cannot be foretold.
    """
    if machine.device == "cpu" or config is None or batch is None:
        return None
    try:
        return totals(estimate_all(config, params, machine.precision, batch, machine.device))
    except ConfigError:
        if params.strategy == "auto":
            raise
        return None
