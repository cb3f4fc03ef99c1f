"""Compare variants of a training step on SmolLM2-135M: for `benchmarks.fused` and `benchmarks.cpu_step`.

The program measures all variants in one process, and starts itself once for each to measure its memory.
"""

import argparse
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Record, require_bounds, write_records
from benchmarks.stages import ROOT, make_folder
from nightshift.data.encode import IGNORED

PACKAGES = ("peft", "torch", "transformers")
log = logging.getLogger(__name__)


def declare_variants(parser: argparse.ArgumentParser, ways: Iterable[str]) -> None:
    """Declare the arguments with which a program measures the memory of one variant."""
    parser.add_argument(
        "--way", choices=ways, help="train one step of a base and print the peak memory in MiB"
    )
    parser.add_argument("--base", help="folder of the base, for --way")


def write_comparison(name: str, measure: Callable[[str], list[Record]]) -> None:
    """Measure the variants of a base, write `<name>.json`, and require the bounds."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "job", {})
        records = measure(str(Path(folder) / "job" / "data" / "base" / "model"))
    for one in records:
        log.info("%s: %.4g %s, bound %s", one["claim"], one["value"], one["unit"], one["bound"])
    write_records(name, records, PACKAGES)
    require_bounds(records)


def measure_memory(program: str, way: str, base: str) -> float:
    """Return the peak memory of one variant in MiB, measured in a process of its own."""
    command = [sys.executable, "-m", program, "--way", way, "--base", base]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def print_peak() -> None:
    """Print the peak resident memory of this process, in MiB; `ru_maxrss` includes its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    sys.stdout.write(f"{peak / 1024}\n")


def make_row(lengths: Sequence[int]) -> dict[str, Any]:
    """Return one flattened row of random tokens; the second half of each example is labelled."""
    chance = random.Random(0)
    ids = torch.tensor([chance.choices(range(1000, 40_000), k=sum(lengths))])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    labels = ids.clone()
    for start, length in zip(ends.tolist(), lengths, strict=False):
        labels[0, start : start + length // 2] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends.int(),
    }
