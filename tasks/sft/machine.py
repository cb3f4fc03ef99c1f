"""What this machine has for a training, and which arithmetic and attention kernel run on it.

To know that, kernels have to run, which takes a share of a GPU's memory for as long as the process lives. So
`inspect` asks in a process of its own (`python -m tasks.sft.machine`), which is gone before the ranks start.
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
from nightshift.core.stage import run_main
from nightshift.pipeline import supervise
from tasks.sft import SftParams
from tasks.sft.conflicts import EIGHT_BIT

if TYPE_CHECKING:
    from tasks.sft.probe import Probe

# What `auto` tries on each device, the fastest first; a kernel has to run and to keep packed examples apart.
ATTENTION = {
    "cuda": (
        *("flash_attention_4", "flash_attention_3", "torch_varlen", "flash_attention_2"),
        *("flex_attention", "sdpa", "eager"),
    ),
    "cpu": ("sdpa_per_example", "sdpa", "eager"),
}
BITSANDBYTES = (*EIGHT_BIT, "lion_32bit")
VISIBLE = "CUDA_VISIBLE_DEVICES"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the ranks find.

    Attributes:
        device: cuda or cpu.
        devices: Its visible GPUs, as CUDA_VISIBLE_DEVICES names them; none on the processor.
        memory: Free bytes of the GPU with the least, or None on the processor.
        precision: bf16, fp16, tf32 or fp32: what was asked for, or chosen.
        attention: Attention kernel, asked for or chosen.
        head: Name of the module whose output the model returns as logits, or None if it changes them.
        has_liger: Liger's kernels are installed, and know the model.
    """

    device: str
    devices: tuple[str, ...]
    memory: int | None
    precision: str
    attention: str
    head: str | None
    has_liger: bool


def inspect(params: SftParams, config: Mapping[str, Any], longest: int) -> Machine:
    """Ask a process of its own what this machine has.

    Args:
        params: The section sft.
        config: The model's config.json.
        longest: Tokens of the longest example.

    Raises:
        ConfigError: This machine cannot do what was asked for.
        StageError: The process ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        write_json(file, {"params": params.model_dump(), "config": dict(config), "longest": longest})
        code = subprocess.run([sys.executable, "-m", "tasks.sft.machine", str(file)], check=False).returncode
        answer = read_json(file)
    if "error" in answer:
        raise ConfigError(answer["error"])
    if "device" not in answer:
        raise StageError(f"sft: the look at this machine ended with code {code}; the reason stands above")
    return Machine(**{**answer, "devices": tuple(answer["devices"])})


def main(file: Path) -> None:
    """Answer a question of `inspect` in its file."""
    supervise.die_with_parent()
    asked = read_json(file)
    try:
        answer = asdict(look(SftParams(**asked["params"]), asked["config"], asked["longest"]))
    except ConfigError as err:
        answer = {"error": str(err)}
    write_json(file, answer)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", type=Path, help="the question, and where the answer goes")


def look(params: SftParams, config: Mapping[str, Any], longest: int) -> Machine:
    """Find what this machine has; the process keeps the GPU's memory that this takes. See `inspect`.

    Raises:
        ConfigError: This machine cannot do what was asked for.
    """
    import torch

    from tasks.sft.probe import Probe

    devices = visible_devices()
    device = "cuda" if devices else "cpu"
    if missing := find_missing(params, device):
        raise ConfigError("\n  ".join(["params.yaml: this machine cannot do what sft asks for", *missing]))
    # Before any kernel runs here, and takes memory itself.
    memory = min((torch.cuda.mem_get_info(i)[0] for i in range(len(devices))), default=None)
    precision = choose_precision(params.precision, device)
    if params.fp8_base:
        require_float8(precision, device)
    probe = Probe(params, device, precision, config, longest)
    attention = choose_attention(params.attn_implementation, device, probe)
    has_liger = device == "cuda" and knows_liger(str(config.get("model_type")))
    return Machine(device, devices, memory, precision, attention, probe.find_head(), has_liger)


def visible_devices() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: number, UUID or MIG."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # CUDA leaves out what stands behind a name that it does not know.
    names = os.environ.get(VISIBLE, "").replace(" ", "").split(",")
    return tuple(names[:count]) if VISIBLE in os.environ else tuple(str(i) for i in range(count))


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
        "use_liger_kernel=true": (params.use_liger_kernel is True, "liger_kernel", True),
    }
    found = []
    for what, (is_asked, package, needs_gpu) in needs.items():
        if is_asked and importlib.util.find_spec(package) is None:
            found.append(f"sft.{what} needs {package}; run `pip install -e '.[gpu]'`")
        elif is_asked and needs_gpu and device == "cpu":
            found.append(f"sft.{what} needs a GPU; take another value")
    return found


def knows_liger(model_type: str) -> bool:
    """Tell whether Liger is installed and has kernels for a kind of model."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


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


def require_float8(precision: str, device: str) -> None:
    """Check that this machine multiplies in float8.

    Raises:
        ConfigError: It does not.
    """
    import torch

    from tasks.sft.float8 import Float8Weight

    fault = None
    if precision != "bf16":
        fault = f"it trains in {precision}, and only bf16 goes with it"
    else:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        try:
            Float8Weight(one).project(one)
        # A device that is too old, or a compiler that is missing.
        except Exception as err:  # noqa: BLE001
            fault = f"{type(err).__name__}: {str(err).partition(chr(10))[0]}"
    if fault:
        raise ConfigError(
            f"params.yaml: sft.fp8_base=true does not work on this machine: {fault}; set it to false"
        )


def processor_has_bf16() -> bool:
    """Tell from its flags whether the processor computes in bf16."""
    return "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def choose_attention(requested: str, device: str, probe: "Probe") -> str:
    """Choose the first attention kernel that runs, or check the one that was asked for.

    Raises:
        ConfigError: It does not run here, or it lets packed examples see each other.
    """
    if requested != "auto":
        if fault := probe.try_kernel(requested):
            raise ConfigError(
                f"params.yaml: sft.attn_implementation={requested} does not work on this machine: {fault}; "
                "set auto"
            )
        return requested
    for name in ATTENTION[device]:
        if not (fault := probe.try_kernel(name)):
            return name
        log.info("attention %s: %s; trying the next", name, fault)
    raise ConfigError("params.yaml: sft.attn_implementation=auto: no kernel runs on this machine")


if __name__ == "__main__":
    run_main(main, declare)
