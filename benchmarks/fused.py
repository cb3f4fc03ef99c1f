"""Compare chunked loss and fused LoRA with full logits and PEFT: time per step, and peak memory.

SmolLM2-135M, LoRA of rank 16 on all linear layers, one row of 1024 tokens with four examples, half of
the tokens labelled, in full precision, on one core, in CPU seconds. Both variants alternate in one
process, so that other load on the machine affects both; the memory of each is measured in a separate
process.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import yaml

from benchmarks.record import Record, record
from benchmarks.stages import ROOT
from benchmarks.variants import declare_variants, make_row, measure_memory, print_peak, write_comparison
from nightshift.core.stage import run_main
from tasks.sft import SftParams
from tasks.sft.fused import LossHead, fuse_adapter
from tasks.sft.loss import summed_loss
from tasks.sft.model import load_model

LENGTHS = (400, 300, 200, 124)
ROUNDS = 4
WAYS = ("plain", "fused")


def main(way: str | None, base: str | None) -> None:
    """Measure both variants, or with --way and --base run only the memory measurement of one."""
    torch.set_num_threads(1)
    if way and base:
        step(build(base, way))
        print_peak()
    else:
        write_comparison("fused", measure)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    declare_variants(parser, WAYS)


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
    mib = {way: measure_memory("benchmarks.fused", way, base) for way in WAYS}
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
    loss, _ = summed_loss(model, make_row(LENGTHS), head=head)
    torch.autograd.backward(loss)
    return float(loss.detach())


if __name__ == "__main__":
    run_main(main, declare)
