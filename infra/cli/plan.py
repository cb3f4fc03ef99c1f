"""Preview a training run: steps, learning rate, memory, time, and the stages that DVC reruns.

Everything comes from params.yaml, the packed rows and the base's config.json. Neither weights nor torch
are loaded; what depends on them is assumed and reported as an assumption.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nightshift.core.config import load_params, read_params
from nightshift.core.errors import ConfigError, DataError
from nightshift.core.files import read_json, write_text
from nightshift.core.hardware import cpu_has_bf16
from nightshift.core.paths import BASE, PACKED, TRAINING_RUN
from nightshift.core.state import state_dir
from nightshift.pipeline.graph import changed_stages, find_reruns
from nightshift.pipeline.leases import lease_holder, leased_runs
from nightshift.pipeline.scoreboard import scoreboard_file
from tasks.check import check
from tasks.sft import SftParams
from tasks.sft.backend import find_fitting_strategy, fits, with_processes
from tasks.sft.machine import VISIBLE, Machine
from tasks.sft.memory import Batch, Memory, estimate_all, largest_batch, totals
from tasks.sft.plan import Plan, compile_plan
from tasks.sft.rows import read_sizes
from tasks.sft.strategy import GIB

CONFIG = BASE / "config.json"
# Input file -> stage that writes it.
READS = {PACKED: "pack", CONFIG: "base"}
# Kind of memory -> column heading, short enough for a terminal of 80 columns.
KINDS = {
    "overhead": "process",
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "logits": "logits",
    "total": "total",
}
BLOCKS = "▁▂▃▄▅▆▇█"
# nvidia-smi prints a number, or in brackets the reason why there is none.
VALUE = r"[0-9.]{1,12}|\[[^]]+\]|N/A"
DEVICE = re.compile(
    rf"(?P<name>.+), *(?P<memory>{VALUE}), *(?P<capability>{VALUE}), *(?P<index>\d{{1,4}}), *(?P<uuid>\S+)"
)
QUERY = "name,memory.total,compute_cap,index,uuid"
# Timeout of nvidia-smi; it takes a second or two if no daemon keeps the driver loaded.
DRIVER_SECONDS = 20
REPAIR = "GPUs of this machine are unusable until the driver is repaired"


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of this machine, as detected without torch.

    Attributes:
        device: cuda or cpu.
        gpus: Number of visible GPUs.
        memory: Memory of the first GPU, in bytes; None on the CPU, or if unknown.
        has_bf16: Whether the device computes in bf16.
        source: How the values were determined.
    """

    device: str
    gpus: int
    memory: int | None
    has_bf16: bool
    source: str


def show(console: Console) -> None:
    """Print the plan, and plot the learning rate to a file.

    Raises:
        ConfigError: params.yaml is invalid, a run is active, DVC cannot determine what changed, or nothing
            fits into the device's memory.
        DataError: The rows or the base are missing, or were made from other parameters, code or data.
    """
    check(read_params())
    params = load_params(SftParams, "sft")
    for path, stage in READS.items():
        if not path.is_file():
            raise DataError(f"{path}: not found; run `dvc repro {stage}` first")
    # DVC's own message would advise to delete its lock.
    if any(lease_holder(run) == "alive" for run in leased_runs()):
        raise ConfigError(
            "a run is active in this checkout, and DVC works for one program at a time; wait until the run "
            "has ended, then plan the next one"
        )
    reruns = find_reruns(changed_stages())
    if stale := [stage for stage in READS.values() if stage in reruns]:
        print_reruns(console, reruns)
        raise DataError(
            f"data/{' and data/'.join(stale)}: built from other parameters, code or data; run "
            f"`dvc repro {' '.join(stale)}` first"
        )
    sizes = read_sizes(PACKED)
    found = find_devices()
    params = with_processes(params, found.gpus)
    plan = compile_plan(params, sizes.lengths, sizes.labelled)
    batch = largest_batch(plan.order, sizes.tokens, sizes.labelled, params.per_device_train_batch_size)
    print_training(console, params, plan)
    print_reruns(console, reruns)
    print_choice(console, params, found, batch)


def find_devices() -> Devices:
    """Query the driver for its devices; without a visible GPU, training runs on the CPU."""
    found = query_driver()
    return Devices("cpu", 0, None, cpu_has_bf16(), f"nvidia-smi {found}") if isinstance(found, str) else found


def query_driver() -> Devices | str:
    """Return the visible devices that nvidia-smi lists, or why there are none."""
    query = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            query,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        return "is not installed"
    except OSError as err:
        return f"cannot be run: {err.strerror}; {REPAIR}"
    try:
        answer, _ = process.communicate(timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        # A hung driver can make the process unkillable, so do not wait for its end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        return f"did not respond within {DRIVER_SECONDS} seconds; {REPAIR}"
    # nvidia-smi may print warnings in addition to the devices, and then exits with a code other than 0.
    lines = [found for line in answer.splitlines() if (found := DEVICE.fullmatch(line.strip()))]
    if lines:
        visible = visible_lines(lines, os.environ.get(VISIBLE))
        return describe(visible) if visible else f"lists no GPU of {VISIBLE}={os.environ[VISIBLE]}"
    output = " ".join(answer.split())[:200] or "no output"
    return f"exited with code {process.returncode}: {output}; {REPAIR}"


def visible_lines(lines: Sequence[re.Match[str]], visible: str | None) -> list[re.Match[str]]:
    """Return the lines of the devices in CUDA_VISIBLE_DEVICES, by index or UUID, in its order.

    As in CUDA, UUIDs can be abbreviated, and everything after an unknown name is ignored. A MIG instance
    is counted as the first device.

    Example:
        >>> lines = [DEVICE.fullmatch(f"NVIDIA L4, 23034, 8.9, {i}, GPU-{i}f") for i in range(3)]
        >>> [line["index"] for line in visible_lines(lines, "2,GPU-0,7,1")], len(visible_lines(lines, None))
        (['2', '0'], 3)
    """
    if visible is None:
        return list(lines)
    chosen = []
    for name in visible.replace(" ", "").split(","):
        by_name = [one for one in lines if name == one["index"] or (name and one["uuid"].startswith(name))]
        by_part = lines[:1] if name.startswith("MIG-") else []
        if not (found := [*by_name, *by_part]):
            break
        chosen.append(found[0])
    return chosen


def describe(lines: Sequence[re.Match[str]]) -> Devices:
    """Parse the lines of the visible devices; the first one represents all.

    Memory and compute capability are optional: a GPU that shares the machine's memory reports none.

    Example:
        >>> describe([DEVICE.fullmatch("NVIDIA H100 80GB HBM3, 81559, 9.0, 0, GPU-1")]).memory
        85520809984
        >>> print(describe([DEVICE.fullmatch("NVIDIA GB10, [N/A], 12.1, 0, GPU-1")]).memory)
        None
    """
    found = lines[0]
    name, memory, capability = found["name"], read_number(found["memory"]), read_number(found["capability"])
    unknown = [
        note
        for note, value in (
            ("memory unknown, so fit is not checked", memory),
            ("compute capability unknown, so bf16 is assumed", capability),
        )
        if value is None
    ]
    name = name if len(lines) == 1 else f"{len(lines)} x {name}"
    source = "; ".join([f"{name}, as reported by nvidia-smi", *unknown, "assuming torch can use it"])
    has_bf16 = capability is None or capability >= 8
    size = None if memory is None else int(memory * 2**20)
    return Devices("cuda", len(lines), size, has_bf16, source)


def read_number(text: str) -> float | None:
    """Parse a positive number; return None for anything else, such as [N/A] or [Not Supported]."""
    try:
        return float(text) or None
    except ValueError:
        return None


def choose_precision(requested: str, found: Devices) -> str:
    """Choose the precision as `tasks.sft.machine.choose_precision` does."""
    if requested != "auto":
        return requested
    return "bf16" if found.has_bf16 else "fp32"


def as_machine(found: Devices, precision: str, params: SftParams) -> Machine:
    """Return the machine description for the choice of a strategy; kernels are not tested here."""
    names = tuple(str(i) for i in range(found.gpus))
    kernel = params.attn_implementation
    return Machine(found.device, names, found.memory, precision, kernel, head=None, has_liger=False)


def print_training(console: Console, params: SftParams, plan: Plan) -> None:
    """Print the length of the training run and its learning rate."""
    tokens, rates = sum(plan.tokens), plan.learning_rate
    picture = state_dir() / "plan.svg"
    write_text(picture, svg(rates))
    table = Table(title="Training", box=None, show_header=False)
    table.add_row("steps", f"{plan.steps:,} of {plan.rows_per_step} rows")
    table.add_row("tokens", f"{tokens:,}")
    table.add_row("supervised tokens", f"{sum(plan.supervised_tokens):,}")
    peak = f"peak {max(rates):.2e}, last {rates[-1]:.2e}, {params.lr_scheduler_type}"
    table.add_row("learning rate", f"{sparkline(rates)}")
    table.add_row("", f"{peak}; {picture}")
    table.add_row("time", expected_time(tokens))
    console.print(table)


def print_choice(console: Console, params: SftParams, found: Devices, batch: Batch) -> None:
    """Print the memory of the training run on the devices, and the chosen strategy.

    Raises:
        ConfigError: Nothing fits into the device's memory.
    """
    config, precision = read_json(CONFIG), choose_precision(params.precision, found)
    try:
        name, reason, checkpointing = find_fitting_strategy(
            params, as_machine(found, precision, params), config, batch
        )
    except ConfigError:
        # The table shows how much memory is missing.
        print_memory(console, estimate_all(config, params, precision, batch, found.device))
        raise
    known = params.model_copy(update={"activation_checkpointing": checkpointing})
    sizes = estimate_all(config, known, precision, batch, found.device)
    print_memory(console, sizes)
    console.print(f"largest micro-batch: {batch.tokens:,} tokens, {batch.labelled:,} of them labelled")
    console.print(f"device: {found.device}, precision {precision} ({found.source})")
    if params.attn_implementation == "auto":
        kernel = "sdpa" if found.gpus else "sdpa_per_example"
        console.print(f"attention: {kernel} is assumed; kernels are tested when training starts")
    if checkpointing and params.activation_checkpointing == "auto":
        console.print("activation checkpointing: on, since the run does not fit without it")
    is_fit = fits(name, totals(sizes), found.memory)
    console.print(
        f"strategy: [bold]{name}[/bold] ({reason}), {params.ranks} processes, "
        f"micro-batch {params.per_device_train_batch_size} rows"
        + ("" if is_fit else "; [bold]it does not fit into device memory[/bold]")
    )


def print_memory(console: Console, sizes: Mapping[str, Memory]) -> None:
    """Print the memory of each strategy, by kind."""
    table = Table(title="Peak memory of one device, in GiB", box=None)
    table.add_column("strategy")
    for heading in KINDS.values():
        table.add_column(heading, justify="right")
    table.add_column("peak at")
    for name, memory in sizes.items():
        table.add_row(name, *(f"{getattr(memory, kind) / GIB:.2f}" for kind in KINDS), memory.moment)
    console.print(table)


def expected_time(tokens: int) -> str:
    """Estimate the duration of the training run from the throughput of the last one."""
    for path in (TRAINING_RUN, scoreboard_file()):
        if path.is_file() and (speed := read_json(path).get("tokens_per_second")):
            minutes = tokens / speed / 60
            return (
                f"{minutes:,.1f} minutes at the {speed:,.0f} tokens/s of the last training run ({path.name})"
            )
    return "unknown: no training run was measured here"


def sparkline(values: Sequence[float], width: int = 50) -> str:
    """Draw values as block characters; the highest value is a full block.

    Example:
        >>> sparkline([0.0, 0.5, 1.0])
        '▁▅█'
    """
    step = max(1, len(values) / width)
    chosen = [values[int(i * step)] for i in range(min(width, len(values)))]
    top = max(chosen) or 1.0
    return "".join(BLOCKS[round(value / top * (len(BLOCKS) - 1))] for value in chosen)


def svg(values: Sequence[float], width: int = 640, height: int = 200) -> str:
    """Draw values over steps as a line chart, labelled with the highest value and the last step."""
    top, last = max(values) or 1.0, max(1, len(values) - 1)
    points = " ".join(
        f"{50 + i / last * (width - 70):.1f},{height - 30 - value / top * (height - 60):.1f}"
        for i, value in enumerate(values)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
        f'<path d="M50 30V{height - 30}H{width - 20}" fill="none" stroke="gray"/>'
        f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="2"/>'
        f'<text x="4" y="34">{top:.1e}</text><text x="4" y="{height - 26}">0</text>'
        f'<text x="50" y="{height - 12}">step 1</text>'
        f'<text x="{width - 20}" y="{height - 12}" text-anchor="end">step {len(values)}</text></svg>\n'
    )


def print_reruns(console: Console, reruns: Mapping[str, str]) -> None:
    """Print the stages that `dvc repro` would run, and why."""
    table = Table(title="dvc repro would run", box=None, show_header=False)
    for stage, reason in reruns.items():
        table.add_row(stage, reason)
    if not reruns:
        table.add_row("nothing", "all stages are up to date")
    console.print(table)
