"""Probe this machine: its GPUs, and which precision and attention kernel run on it.

Probing runs kernels, which occupies GPU memory as long as the process lives. `probe_in_subprocess`
therefore probes in a separate process (`python -m tasks.sft.machine`), which ends before the ranks start.
"""

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import read_json, write_json
from nightshift.core.hardware import cpu_has_bf16
from nightshift.core.stage import run_main
from nightshift.pipeline import supervise
from tasks.sft import SftParams
from tasks.sft.conflicts import EIGHT_BIT, PAGED

if TYPE_CHECKING:
    from tasks.sft.probe import Probe

# Kernels that `auto` tries, fastest first; a kernel must run and keep packed examples isolated.
ATTENTION = {
    "cuda": (
        *("flash_attention_4", "flash_attention_3", "torch_varlen", "flash_attention_2"),
        *("sdpa_per_example", "sdpa", "eager"),
    ),
    "cpu": ("avx512_per_example", "sdpa_per_example", "sdpa", "eager"),
}
BITSANDBYTES = (*EIGHT_BIT, *PAGED, "lion_32bit")
VISIBLE = "CUDA_VISIBLE_DEVICES"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """Properties of this machine.

    Attributes:
        device: cuda or cpu.
        devices: Visible GPUs, as named in CUDA_VISIBLE_DEVICES; empty on a CPU.
        memory: Free bytes of the GPU with the least free memory, or None on a CPU.
        precision: bf16, fp16, tf32 or fp32: requested or chosen.
        attention: Attention implementation, requested or chosen.
        head: Name of the module whose output the model returns as logits, or None if it changes them.
        has_liger: Whether Liger is installed and supports the model.
        leak: Why the model does not keep the examples of one row apart, or None if it does.
        unreached: Names of modules that text does not reach, such as the encoder of images.
    """

    device: str
    devices: tuple[str, ...]
    memory: int | None
    precision: str
    attention: str
    head: str | None
    has_liger: bool
    leak: str | None = None
    unreached: tuple[str, ...] = ()


def probe_in_subprocess(
    params: SftParams, config: Mapping[str, Any], longest: int, start: int | None = None
) -> Machine:
    """Probe this machine in a separate process.

    Args:
        params: `sft` section of params.yaml.
        config: The model's config.json.
        longest: Length of the longest example in tokens.
        start: Version from which training starts, or None for the base.

    Raises:
        ConfigError: This machine does not support a requested value.
        StageError: The process ended without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        request = {"params": params.model_dump(), "config": dict(config), "longest": longest, "start": start}
        write_json(file, request)
        code = subprocess.run([sys.executable, "-m", "tasks.sft.machine", str(file)], check=False).returncode
        result = read_json(file)
    if "error" in result:
        raise ConfigError(result["error"])
    if "device" not in result:
        raise StageError(f"sft: probing this machine failed with code {code}; see the output above")
    return Machine(**{**result, "devices": tuple(result["devices"]), "unreached": tuple(result["unreached"])})


def main(file: Path) -> None:
    """Read the request of `probe_in_subprocess` from a file, and write the result to the same file."""
    supervise.die_with_parent()
    request = read_json(file)
    try:
        params = SftParams(**request.pop("params"))
        result = asdict(probe_machine(params, **request))
    except ConfigError as err:
        result = {"error": str(err)}
    write_json(file, result)


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the command-line arguments."""
    parser.add_argument("file", type=Path, help="request; the result is written to the same file")


def probe_machine(
    params: SftParams, config: Mapping[str, Any], longest: int, start: int | None = None
) -> Machine:
    """Probe this machine; the process keeps the GPU memory that this takes. See `probe_in_subprocess`.

    Raises:
        ConfigError: This machine does not support a requested value.
    """
    import torch

    from tasks.sft.probe import Probe
    from tasks.sft.targets import find_adapter_faults, find_other_weights

    devices = visible_devices()
    device = "cuda" if devices else "cpu"
    if missing := find_missing(params, device):
        raise ConfigError("\n  ".join(["params.yaml: this machine does not support these values:", *missing]))
    # Before any kernel runs and takes memory itself.
    memory = min((torch.cuda.mem_get_info(i)[0] for i in range(len(devices))), default=None)
    precision = choose_precision(params.precision, device)
    if params.fp8_base:
        require_float8(precision, device)
    probe = Probe(params, device, precision, config, longest)
    if faults := find_adapter_faults(config, params):
        raise ConfigError("\n  ".join(["params.yaml: these parameters do not fit the base:", *faults]))
    attention, leak = choose_attention(params.attn_implementation, device, probe)
    unreached = probe.find_unreached()
    if start is not None and params.adapter:
        for fault in find_other_weights(config, params, start, unreached):
            raise ConfigError(f"params.yaml: {fault}")
    return Machine(
        device=device,
        devices=devices,
        memory=memory,
        precision=precision,
        attention=attention,
        head=probe.find_head(),
        has_liger=device == "cuda" and supports_liger(str(config.get("model_type"))),
        leak=leak,
        unreached=unreached,
    )


def visible_devices() -> tuple[str, ...]:
    """Return the visible GPUs, as named in CUDA_VISIBLE_DEVICES: index, UUID or MIG."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # CUDA ignores all entries after an unknown one.
    names = os.environ.get(VISIBLE, "").replace(" ", "").split(",")
    return tuple(names[:count]) if VISIBLE in os.environ else tuple(str(i) for i in range(count))


def find_missing(params: SftParams, device: str) -> list[str]:
    """List requested values that need a missing package or GPU, each with the fix.

    Args:
        params: `sft` section of params.yaml.
        device: cuda or cpu.
    """
    # Option -> (requested, package, whether it needs a GPU).
    needs = {
        "adapter=qlora": (params.adapter == "qlora", "bitsandbytes", False),
        f"optim={params.optim}": (params.optim in BITSANDBYTES, "bitsandbytes", True),
        "optim=schedule_free_adamw": (params.optim == "schedule_free_adamw", "schedulefree", False),
        "use_liger_kernel=true": (params.use_liger_kernel is True, "liger_kernel", True),
    }
    found = []
    for what, (is_requested, package, needs_gpu) in needs.items():
        if is_requested and importlib.util.find_spec(package) is None:
            found.append(f"sft.{what} needs {package}; run `pip install -e '.[gpu]'`")
        elif is_requested and needs_gpu and device == "cpu":
            found.append(f"sft.{what} needs a GPU; set another value")
    return found


def supports_liger(model_type: str) -> bool:
    """Return whether Liger is installed and supports a model type."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def choose_precision(requested: str, device: str) -> str:
    """Choose the precision, or check that this machine supports it.

    Raises:
        ConfigError: The requested precision is not supported.
    """
    import torch

    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        has_tf32 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        has_bf16, has_tf32 = cpu_has_bf16(), False
    missing = {"bf16": not has_bf16, "tf32": not has_tf32, "fp16": device == "cpu"}
    if missing.get(requested):
        raise ConfigError(
            f"params.yaml: sft.precision={requested}, but this machine's {device} does not support "
            f"{requested}; set auto or fp32"
        )
    if requested == "auto":
        return "bf16" if has_bf16 else "fp32"
    return requested


def require_float8(precision: str, device: str) -> None:
    """Check that float8 matrix products run on this machine.

    Raises:
        ConfigError: They do not run, or the precision is not bf16.
    """
    import torch

    from tasks.sft.float8 import Float8Weight

    fault = None
    if precision != "bf16":
        fault = f"precision is {precision}, but float8 needs bf16"
    else:
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        try:
            Float8Weight(ones).project(ones)
        # The device is too old, or a compiler is missing.
        except Exception as err:  # noqa: BLE001
            fault = f"{type(err).__name__}: {str(err).partition(chr(10))[0]}"
    if fault:
        raise ConfigError(
            f"params.yaml: sft.fp8_base=true does not work on this machine: {fault}; set it to false"
        )


def choose_attention(requested: str, device: str, probe: "Probe") -> tuple[str, str | None]:
    """Choose the first attention kernel that keeps the examples of a row apart, or check the requested one.

    Returns:
        The kernel, and why it does not keep examples apart. If none does, the first that runs.

    Raises:
        ConfigError: It does not run here.
    """
    if requested != "auto":
        if fault := probe.try_kernel(requested):
            raise ConfigError(
                f"params.yaml: sft.attn_implementation={requested} does not work on this machine: {fault}; "
                "set auto"
            )
        return requested, probe.find_leak(requested)
    runs: list[tuple[str, str]] = []
    for name in ATTENTION[device]:
        fault = probe.try_kernel(name)
        leak = None if fault else probe.find_leak(name)
        if not fault and not leak:
            return name, None
        log.info("attention %s: %s; trying the next", name, fault or leak)
        if leak:
            runs.append((name, leak))
    if not runs:
        raise ConfigError("params.yaml: sft.attn_implementation=auto: no kernel runs on this machine")
    return runs[0]


if __name__ == "__main__":
    run_main(main, declare)
