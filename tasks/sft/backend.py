"""Choose once how training runs here: processes, devices, precision, kernel, strategy."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nightshift.core.errors import ConfigError
from nightshift.core.hardware import available_memory
from nightshift.core.state import user_path
from tasks.sft import SftParams
from tasks.sft.machine import VISIBLE, Machine
from tasks.sft.memory import Batch, estimate_all, totals
from tasks.sft.strategy import GIB, choose_lora, choose_loss, choose_strategy

# Minimum memory, in bytes, for two processes: with less, the second leaves no room for the model.
ROOM_FOR_TWO = 4 * GIB
# A line of DeepSpeed's hostfile.
HOST = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)\s*(#.*)?")


@dataclass(frozen=True, slots=True)
class Backend:
    """Resolved settings of a training run.

    Attributes:
        device: cuda or cpu.
        devices: GPUs of this machine's ranks, as named in CUDA_VISIBLE_DEVICES; empty on a CPU.
        num_processes: Number of ranks on all machines.
        precision: bf16, fp16, tf32 or fp32.
        attention: Attention implementation.
        strategy: Distributed strategy.
        reason: Reason for the strategy.
        loss: Loss computation: chunked or logits.
        lora: Computation of the adapter layers: fused or peft; None without an adapter.
        activation_checkpointing: Whether activations are recomputed in the backward pass.
        use_liger_kernel: Whether Liger's kernels are used.
        batches: flattened: the rows of a micro-batch become one, without padding. padded: for a model that
            does not keep the examples of one row apart.
        unreached: Names of modules that text does not reach; they are not trained.
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
    batches: Literal["flattened", "padded"] = "flattened"
    unreached: tuple[str, ...] = ()

    def key(self) -> str:
        """Return what decides the result: GPUs of one kind compute the same, and the reason is text."""
        return json.dumps({**asdict(self), "devices": None, "reason": None}, sort_keys=True)


def with_processes(params: SftParams, gpus: int) -> SftParams:
    """Return the parameters with `num_processes: auto` resolved.

    Args:
        params: `sft` section of params.yaml.
        gpus: Number of visible GPUs on this machine.

    Raises:
        ConfigError: The number does not fit this machine or the hostfile.
    """
    number = params.num_processes
    if params.hostfile is not None:
        slots = sum(read_hostfile(user_path(params.hostfile)).values())
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
        number = gpus or (2 if available_memory() >= ROOM_FOR_TWO else 1)
    elif gpus and number > gpus:
        where = f"{VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else "this machine"
        raise ConfigError(
            f"params.yaml: sft.num_processes={number}, but {where} has {gpus} GPUs; set auto, or {gpus}"
        )
    return params.model_copy(update={"num_processes": number})


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a DeepSpeed hostfile: host name -> slots.

    Raises:
        ConfigError: The file does not exist, a line is not `name slots=n`, or a name repeats.
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


def choose_backend(
    params: SftParams, machine: Machine, config: Mapping[str, Any] | None = None, batch: Batch | None = None
) -> Backend:
    """Choose the strategy and other values left open in params.yaml; take the rest from the machine.

    Args:
        params: `sft` section of params.yaml after `with_processes`.
        machine: Properties of this machine.
        config: The model's config.json; with `batch` it decides what fits in memory. None skips this.
        batch: Largest micro-batch, or None.

    Raises:
        ConfigError: No strategy fits in memory.
    """
    liger = params.use_liger_kernel
    update = {
        "attn_implementation": machine.attention,
        "use_liger_kernel": machine.has_liger and not params.torch_compile if liger == "auto" else liger,
    }
    strategy, reason, checkpointing = find_fitting_strategy(
        params.model_copy(update=update), machine, config, batch
    )
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
        batches="padded" if machine.leak else "flattened",
        unreached=machine.unreached,
    )


def find_fitting_strategy(
    params: SftParams, machine: Machine, config: Mapping[str, Any] | None, batch: Batch | None
) -> tuple[str, str, bool]:
    """Choose the strategy, its reason and activation checkpointing; see `choose_backend`.

    `auto` keeps the activations if any strategy then fits.

    Raises:
        ConfigError: No strategy fits in memory.
    """
    requested = params.activation_checkpointing
    options = (False, True) if requested == "auto" else (requested,)
    for option in options:
        resolved = params.model_copy(update={"activation_checkpointing": option})
        needs = memory_needs(resolved, machine, config, batch)
        is_last = option == options[-1] or needs is None
        try:
            strategy, reason = choose_strategy(resolved, needs, machine.memory)
        except ConfigError:
            if is_last:
                raise
            continue
        if is_last or fits(strategy, needs, machine.memory):
            break
    return strategy, reason, option


def fits(strategy: str, needs: Mapping[str, int] | None, memory: int | None) -> bool:
    """Return whether a strategy fits in device memory, or either size is unknown."""
    return needs is None or memory is None or needs[strategy] <= memory


def memory_needs(
    params: SftParams, machine: Machine, config: Mapping[str, Any] | None, batch: Batch | None
) -> dict[str, int] | None:
    """Return strategy -> bytes per GPU; None on a CPU, or if no estimate is needed.

    Raises:
        ConfigError: `strategy: auto`, and the memory of this model cannot be estimated.
    """
    if machine.device == "cpu" or config is None or batch is None:
        return None
    try:
        return totals(estimate_all(config, params, machine.precision, batch, machine.device))
    except ConfigError:
        if params.strategy == "auto":
            raise
        return None
