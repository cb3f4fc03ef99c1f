"""Tokens per second and use of the arithmetic on one NVIDIA GPU: `make bench-gpu`.

A Llama of 8 billion random weights, LoRA of rank 16 on all linear layers, rows of 4096 tokens, two in a
forward pass; 10 steps warm up, 30 are timed, by the times at which the stage tells its tracker of them. A
ladder: each attention kernel, then, with the fastest one, kinds of rows, activation checkpointing and Liger.
What does not run is recorded with its reason. `--rehearse` takes a model of two layers and short rows on any
machine.
"""

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import Record, record, require_bounds, write_records
from benchmarks.stages import ROOT, metric_history, run_stage
from tasks.files import read_json, write_json, write_rows
from tasks.pack import ROWS
from tasks.schemas import GROUPED
from tasks.sft.backend import ATTENTION
from tasks.stage import run_main

PACKAGES = ("accelerate", "peft", "torch", "transformers", "trl")
BATCH, WARM_UP, TIMED = 2, 10, 30
# One H100, LoRA on Llama-3-8B, rows of 4096 tokens, two at a time (NeMo Automodel, docs/performance-summary).
ANCHOR = 12_473.0
# Operations per second in dense bf16, by the name of the device (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# Llama-3-8B, and one with which the benchmark itself can be tried.
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
REHEARSAL = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rung:
    """One training: a kernel, a kind of rows, and what saves memory.

    Attributes:
        attention: Kernel.
        rows: full: one example a row, as in the anchor; packed: examples of lognormal length; alone: the same
            examples, one a row.
        activation_checkpointing: As in params.yaml.
        use_liger_kernel: As in params.yaml.
    """

    attention: str
    rows: Literal["full", "packed", "alone"] = "full"
    activation_checkpointing: bool = False
    use_liger_kernel: bool = False


@dataclass(frozen=True, slots=True)
class Size:
    """The model and the rows."""

    shape: dict[str, Any]
    length: int


def main(*, rehearse: bool) -> None:
    """Climb the ladder, write results/gpu.json, and say what does not hold."""
    if not rehearse and not torch.cuda.is_available():
        sys.exit("error: no NVIDIA GPU; --rehearse tries the benchmark on a small model")
    size = Size(REHEARSAL, 256) if rehearse else Size(LLAMA_8B, 4096)
    with tempfile.TemporaryDirectory() as folder:
        records = measure(Path(folder), size)
    for one in records:
        log.info("%s: %.4g %s, bound %s", one["claim"], one["value"], one["unit"], one["bound"])
    if not rehearse:
        write_records("gpu", records, PACKAGES)
    require_bounds(records)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--rehearse", action="store_true", help="a small model, anywhere; writes nothing")


def measure(folder: Path, size: Size) -> list[Record]:
    """Measure every kernel, and the other rungs with the fastest of them."""
    base = make_base(folder / "base", size)
    speeds: dict[Rung, float] = {}
    records = []
    for number, rung in enumerate(ladder(speeds)):
        result = train(folder / f"{number:02}", base, rung, size)
        if "tokens_per_second" in result:
            speeds[rung] = result["tokens_per_second"]
        log.info("%s: %s", rung, result)
        records.append(describe(rung, result, size))
    best = max((speed for rung, speed in speeds.items() if rung.rows == "full"), default=0.0)
    bound = ANCHOR if device().startswith("NVIDIA H") else None
    return [*records, record("tokens/s of the fastest on full rows", best, "tokens/s", at_least=bound)]


def ladder(speeds: dict[Rung, float]) -> Iterator[Rung]:
    """Yield the rungs; those after the kernels build on the fastest one, of `speeds`."""
    yield from (Rung(name) for name in ATTENTION)
    if not speeds:
        return
    best = max(speeds, key=speeds.__getitem__).attention
    yield Rung(best, rows="packed")
    yield Rung(best, rows="alone")
    yield Rung(best, activation_checkpointing=True)
    yield Rung(best, use_liger_kernel=True)
    yield Rung(best, activation_checkpointing=True, use_liger_kernel=True)


def make_base(folder: Path, size: Size) -> Path:
    """Write random weights of a shape, with the tokenizer of the demo's base; return data/base."""
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    run_stage("base", folder)
    base = folder / "data" / "base"
    demo = read_json(base / "model" / "config.json")
    config = LlamaConfig(**size.shape, bos_token_id=demo["bos_token_id"], eos_token_id=demo["eos_token_id"])
    (base / "model" / "model.safetensors").unlink()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base / "model")
    write_json(base / "base.json", {"model": "random", "dtype": "bfloat16", "files": {}})
    return base


def train(folder: Path, base: Path, rung: Rung, size: Size) -> dict[str, Any]:
    """Train one rung.

    Returns:
        tokens_per_second and memory_gib, or error: why it does not run.
    """
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "base").symlink_to(base)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["sft"] |= {
        "strategy": "single",
        "num_processes": 1,
        "precision": "bf16",
        "per_device_train_batch_size": BATCH,
        "max_steps": WARM_UP + TIMED,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_steps": WARM_UP + TIMED,
        "max_grad_norm": 0.0,
        "attn_implementation": rung.attention,
        "activation_checkpointing": rung.activation_checkpointing,
        "use_liger_kernel": rung.use_liger_kernel,
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    rows = list(make_rows(rung, size, BATCH * (WARM_UP + TIMED)))
    write_rows(folder / "data" / "pack" / "train.parquet", rows, ROWS)
    write_rows(folder / "data" / "split" / "validation.parquet", [], GROUPED)
    try:
        run_stage("sft", folder)
    except SystemExit as err:
        lines = str(err).splitlines()
        return {"error": next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])}
    told = {metric.step: metric.timestamp for metric in metric_history(folder, "loss")}
    seconds = (told[WARM_UP + TIMED] - told[WARM_UP]) / 1000
    memory = max(metric.value for metric in metric_history(folder, "peak_memory_gib"))
    tokens = sum(read_json(folder / "data" / "sft" / "plan.json")["tokens"][WARM_UP:])
    return {"tokens_per_second": tokens / seconds, "memory_gib": round(memory, 2)}


def make_rows(rung: Rung, size: Size, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of random tokens; the second half of each example has labels, all of it in full rows."""
    rng = random.Random(0)
    for number in range(count):
        lengths = draw_lengths(rung, size.length, rng)
        ids = rng.choices(range(size.shape["vocab_size"]), k=sum(lengths))
        labels = list(ids)
        if rung.rows != "full":
            start = 0
            for length in lengths:
                labels[start : start + length // 2] = [-100] * (length // 2)
                start += length
        yield {
            "input_ids": ids,
            "labels": labels,
            "seq_lengths": lengths,
            "example_ids": [f"{number}/{i}" for i in range(len(lengths))],
            "origins": ["random"] * len(lengths),
            "starts": [0] * len(lengths),
        }


def draw_lengths(rung: Rung, length: int, rng: random.Random) -> list[int]:
    """Draw the lengths of the examples of one row: lognormal, the median an eighth of the row."""
    if rung.rows == "full":
        return [length]
    lengths: list[int] = []
    while sum(lengths) < length:
        one = round(rng.lognormvariate(0, 0.7) * length / 8)
        lengths.append(min(max(one, 16), length))
        if rung.rows == "alone":
            return lengths
    return [*lengths[:-1], length - sum(lengths[:-1])]


def describe(rung: Rung, result: dict[str, Any], size: Size) -> Record:
    """Record a rung: 4 operations for a weight and token, since LoRA needs no gradients of the base."""
    speed = result.get("tokens_per_second", 0.0)
    weights = count_weights(size.shape)
    peak = next((value for name, value in PEAKS.items() if name in device()), None)
    more = {
        "rung": asdict(rung),
        "device": device(),
        "utilisation": round(4 * weights * speed / peak, 4) if peak else None,
        **result,
    }
    return record(f"tokens/s: {', '.join(map(str, asdict(rung).values()))}", speed, "tokens/s", **more)


def count_weights(shape: dict[str, Any]) -> int:
    """Count the weights of a shape, embeddings and head included."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**shape)).parameters())


def device() -> str:
    """Name of the GPU, or cpu."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    run_main(main, declare)
