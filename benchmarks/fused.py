"""Compare chunked loss and fused LoRA with full logits and PEFT: time per step, and peak memory.

SmolLM2-135M, LoRA of rank 16 on all linear layers, one row of 1024 tokens with four examples, half of
the tokens labelled, in full precision, on one core, in CPU seconds. Both variants alternate in one
process, so that other load on the machine affects both; the memory of each is measured in a separate
process.
"""

import argparse
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.record import Record, record, require_bounds, write_records
from benchmarks.stages import ROOT, make_folder
from nightshift.core.stage import run_main
from nightshift.data.encode import IGNORED
from tasks.sft import SftParams
from tasks.sft.fused import LossHead, fuse_adapter
from tasks.sft.loss import summed_loss
from tasks.sft.model import load_model

PACKAGES = ("peft", "torch", "transformers")
LENGTHS = (400, 300, 200, 124)
ROUNDS = 4
WAYS = ("plain", "fused")
log = logging.getLogger(__name__)


def main(way: str | None, base: str | None) -> None:
    """Measure both variants, or with --way and --base run only the memory measurement of one."""
    torch.set_num_threads(1)
    if way and base:
        step(build(base, way))
        sys.stdout.write(f"{peak_mib()}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "job", {})
        records = measure(str(Path(folder) / "job" / "data" / "base" / "model"))
    for one in records:
        log.info("%s: %.4g %s, bound %s", one["claim"], one["value"], one["unit"], one["bound"])
    write_records("fused", records, PACKAGES)
    require_bounds(records)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--way", choices=WAYS, help="train one step of a base and print the peak memory in MiB"
    )
    parser.add_argument("--base", help="folder of the base, for --way")


def measure(base: str) -> list[Record]:
    """Measure the two variants alternately."""
    models = {way: build(base, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    for number in range(ROUNDS + 1):
        for way, model in models.items():
            begin = time.process_time()
            losses[way] = step(model)
            if number:
                seconds[way].append(time.process_time() - begin)
    mib = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.fused", "--way", way, "--base", base]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        mib[way] = float(output.splitlines()[-1])
    plain, fused = (statistics.median(seconds[way]) for way in WAYS)
    difference = abs(losses["fused"] / losses["plain"] - 1)
    return [
        record("CPU time of a step, plain / fused", plain / fused, "ratio", at_least=1.0, seconds=seconds),
        record("peak memory, fused / plain", mib["fused"] / mib["plain"], "ratio", at_most=1.0, mib=mib),
        record("relative difference of the losses", difference, "ratio", at_most=1e-5),
    ]


def build(base: str, way: str) -> tuple[Any, LossHead | None]:
    """Load the model, and set it up for one of the variants."""
    section = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sft"]
    params = SftParams(
        **section | {"strategy": "single", "num_processes": 1, "activation_checkpointing": False}
    )
    torch.manual_seed(0)
    model = load_model(base, params, "single", "fp32", "sdpa_per_example")
    model.enable_input_require_grads()
    if way == "plain":
        return model, None
    fuse_adapter(model)
    return model, LossHead(model.get_output_embeddings())


def step(built: tuple[Any, LossHead | None]) -> float:
    """Compute loss and gradients of one row, and return the loss."""
    model, head = built
    model.zero_grad()
    loss, _ = summed_loss(model, make_row(), head=head)
    torch.autograd.backward(loss)
    return float(loss.detach())


def peak_mib() -> float:
    """Return the peak resident memory of this process, in MiB; `ru_maxrss` includes its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def make_row(lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
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


if __name__ == "__main__":
    run_main(main, declare)
