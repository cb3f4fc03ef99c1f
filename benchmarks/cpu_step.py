"""Compare a training step on a CPU in bf16 with the stage's own kernels in C and with torch's.

SmolLM2-135M, LoRA of rank 16 on all linear layers in bf16, as under ZeRO, fused adapter layers, chunked
loss and AdamW: one rank of the stage, on one core, in CPU seconds. One row of 384 tokens, as in the demo,
and one of 1024, as in `benchmarks.sft`. Both variants alternate in one process, so that other load on the
machine affects both; so do the matrix products of the frozen weights alone, which bound the speed. The
memory of each variant is measured in a separate process.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from benchmarks.record import Record, record
from benchmarks.stages import ROOT
from benchmarks.variants import declare_variants, make_row, measure_memory, print_peak, write_comparison
from nightshift.core.stage import run_main
from tasks.sft import SftParams
from tasks.sft.fused import LossHead, fuse_adapter, fused_layers
from tasks.sft.layers import fuse_layers
from tasks.sft.loss import summed_loss
from tasks.sft.model import load_model

# Tokens of the examples: a token of them is, on average, in an example as long as in the data (153 and 349).
ROWS = {384: (180, 120, 84), 1024: (500, 280, 150, 94)}
WAYS = {"torch": "sdpa_per_example", "own": "avx512_per_example"}
ROUNDS = 5


def main(way: str | None, base: str | None) -> None:
    """Measure both variants, or with --way and --base run only the memory measurement of one."""
    torch.set_num_threads(1)
    if way and base:
        Rank(base, WAYS[way]).step(make_row(ROWS[1024]))
        print_peak()
    else:
        write_comparison("cpu_step", measure)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    declare_variants(parser, WAYS)


class Rank:
    """A model with its optimizer, as one rank of the stage has them."""

    def __init__(self, base: str, attention: str) -> None:
        """Load the model with an attention kernel, and with what the stage uses beside it."""
        section = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sft"]
        params = SftParams(**section | {"num_processes": 1, "activation_checkpointing": False})
        torch.manual_seed(0)
        # DeepSpeed casts the adapter, which PEFT creates in full precision.
        self.model = load_model(base, params, "zero2", "bf16", attention).to(torch.bfloat16)
        self.model.enable_input_require_grads()
        fuse_adapter(self.model)
        if attention == WAYS["own"]:
            fuse_layers(self.model)
        self.head = LossHead(self.model.get_output_embeddings())
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, row: dict[str, Any]) -> float:
        """Train one step, and return its loss in nats per labelled token."""
        total, _ = summed_loss(self.model, row, head=self.head)
        loss = total / (row["labels"][:, 1:] >= 0).sum()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def multiply(self, row: dict[str, Any]) -> None:
        """Compute the step's products with frozen weights: forward, and backward to the inputs."""
        labelled = int((row["labels"][:, 1:] >= 0).sum())
        weights = [(layer.base_layer.weight, row["labels"].shape[1]) for layer in fused_layers(self.model)]
        for weight, count in [*weights, (self.model.get_output_embeddings().weight, labelled)]:
            out = torch.nn.functional.linear(weight.new_ones(count, weight.shape[1]), weight)
            torch.mm(out, weight)


def measure(base: str) -> list[Record]:
    """Measure the variants with rows of both lengths, and the memory of each."""
    ranks = {way: Rank(base, attention) for way, attention in WAYS.items()}
    records = [one for tokens in ROWS for one in compare(ranks, tokens)]
    mib = {way: measure_memory("benchmarks.cpu_step", way, base) for way in WAYS}
    ratio = mib["own"] / mib["torch"]
    return [*records, record("peak memory, own / torch kernels", ratio, "ratio", at_most=1.02, mib=mib)]


def compare(ranks: Mapping[str, Rank], tokens: int) -> list[Record]:
    """Measure the variants alternately with one row."""
    row = make_row(ROWS[tokens])
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in (*WAYS, "products")}
    for number in range(ROUNDS + 1):
        for way, rank in ranks.items():
            begin = time.process_time()
            losses[way].append(rank.step(row))
            seconds[way] += [time.process_time() - begin] * bool(number)
        begin = time.process_time()
        ranks["own"].multiply(row)
        seconds["products"] += [time.process_time() - begin] * bool(number)
    theirs, ours, products = (statistics.median(used) for used in seconds.values())
    apart = [abs(own / other - 1) for own, other in zip(losses["own"], losses["torch"], strict=True)]
    rows = f"rows of {tokens} tokens"
    share = record(
        f"CPU time of the products with frozen weights / step, {rows}",
        products / ours,
        "share",
        at_least=0.45,
    )
    claim = f"CPU time of a step, torch / own kernels, {rows}"
    return [
        record(claim, theirs / ours, "ratio", at_least=1.35, seconds=seconds),
        share,
        # bf16 has eight bits of precision: a unit in the last place is 1/256.
        record(f"relative difference of the losses, {rows}", max(apart), "ratio", at_most=1 / 256),
    ]


if __name__ == "__main__":
    run_main(main, declare)
