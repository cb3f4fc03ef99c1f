"""Compare the memory that `nightshift plan` estimates with the peak of real training runs on the CPU.

Each training run is a dozen steps of SmolLM2-135M with `python -m tasks.sft`, on rows and examples of
uneven length, because the allocator's overhead grows for some steps. The peak is that of the largest
rank, as recorded by the kernel (VmHWM), so sampling cannot miss it.
"""

import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import yaml
from tokenizers import Tokenizer

from benchmarks.record import Record, record, require_bounds, write_records
from benchmarks.stages import ROOT, environment, metric_history, run_stage
from nightshift.core.files import read_json, write_rows
from nightshift.core.stage import run_main
from tasks.pack import ROWS
from tasks.sft import SftParams
from tasks.sft.job import read_job
from tasks.sft.memory import Batch, estimate, largest_batch
from tasks.sft.rows import read_sizes
from tasks.sft.strategy import GIB
from tasks.snapshot.sources.packages import elements

PACKAGES = ("accelerate", "deepspeed", "peft", "torch", "transformers", "trl")
STEPS = 12
SHORT = {
    "max_steps": STEPS,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "attn_implementation": "sdpa_per_example",
    "save_steps": STEPS,
}
# Polling interval of the ranks, in seconds; the kernel records the peak in between.
PERIOD = 0.05
log = logging.getLogger(__name__)


def main() -> None:
    """Measure, write results/memory.json, and report claims that do not hold."""
    with tempfile.TemporaryDirectory() as folder:
        records = measure(Path(folder))
    write_records("memory", records, PACKAGES)
    require_bounds(records)


def cases() -> Iterator[dict[str, Any]]:
    """Yield the parameters of each training run, with the row length in tokens as `row`."""
    for row, adapter, checkpointing, strategy in product(
        (384, 1024), ("lora", None), (False, True), ("single", "zero2")
    ):
        yield {
            "row": row,
            "adapter": adapter,
            "activation_checkpointing": checkpointing,
            "strategy": strategy,
            "num_processes": 1 if strategy == "single" else 2,
            "precision": "bf16",
        }
    one = {"activation_checkpointing": False, "strategy": "single", "num_processes": 1, "precision": "fp32"}
    yield {"row": 384, "adapter": "lora", **one}


def measure(folder: Path) -> list[Record]:
    """Train each case and compare its peak with the estimate."""
    base = folder / "base"
    base.mkdir()
    shutil.copy(ROOT / "params.yaml", base / "params.yaml")
    run_stage("base", base)
    records = []
    for i, case in enumerate(cases()):
        records.append(compare(folder / f"{i:02}", base / "data" / "base", case))
        log.info("%s: %.3f", records[-1]["claim"], records[-1]["value"])
    return records


def compare(folder: Path, base: Path, case: dict[str, Any]) -> Record:
    """Train one case and record the relative error of the estimate."""
    changes = {key: value for key, value in case.items() if key != "row"}
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sft"]
    params = SftParams(**{**shipped, **SHORT, **changes})
    make_folder(folder, base, params, case["row"])
    peak = peak_of_ranks(folder)
    config = read_json(base / "model" / "config.json")
    batch = Batch(case["row"], case["row"] // 2)
    expected = estimate(config, params, params.strategy, params.precision, batch, "cpu")
    return against_peak(", ".join(f"{key} {value}" for key, value in case.items()), expected.total, peak)


def against_peak(name: str, expected: float, peak: float) -> Record:
    """Record the relative error of an estimate; estimate and peak are in bytes."""
    return record(
        f"estimate of memory against the peak: {name}",
        abs(expected / peak - 1),
        "relative error",
        at_most=0.10,
        estimate_gib=round(expected / GIB, 3),
        peak_gib=round(peak / GIB, 3),
    )


def of_job(folder: Path) -> Record:
    """Compare the estimate with the first rank's peak of a finished job, as logged in its MLflow run."""
    (file,) = (folder / ".nightshift" / "checkpoints").glob("*/job.json")
    job = read_job(file)
    backend = job.backend
    sizes = read_sizes(folder / "data" / "pack" / "train.parquet")
    batch = largest_batch(job.plan.order, sizes.tokens, sizes.labelled, job.micro_batch_size)
    config = read_json(folder / "data" / "base" / "model" / "config.json")
    params = job.params.model_copy(update={"attn_implementation": backend.attention})
    expected = estimate(config, params, backend.strategy, backend.precision, batch, backend.device)
    peak = max(metric.value for metric in metric_history(folder, "peak_memory_gib"))
    return against_peak("the job itself", expected.total, peak * GIB)


def make_folder(folder: Path, base: Path, params: SftParams, length: int) -> None:
    """Create a folder with all inputs of the stage: rows of text, half of the tokens labelled."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "base").symlink_to(base)
    (folder / "params.yaml").write_text(yaml.safe_dump({"sft": params.model_dump()}), encoding="utf-8")
    tokens = read_tokens(base)
    chance = random.Random(0)
    size = STEPS * params.ranks * params.per_device_train_batch_size
    count = size * params.gradient_accumulation_steps
    # The first row is full; the others are up to an eighth shorter.
    lengths = [length, *(chance.randint(length * 7 // 8, length) for _ in range(count - 1))]
    rows = [packed_row(tokens, one, i, chance) for i, one in enumerate(lengths)]
    write_rows(folder / "data" / "pack" / "train.parquet", rows, ROWS)


def read_tokens(base: Path) -> list[int]:
    """Tokenize text about the elements: the self-test before step 1 compares models on real text."""
    tokenizer = Tokenizer.from_file(str(base / "model" / "tokenizer.json"))
    texts = (turn["content"] for row in elements() for turn in row["messages"])
    tokens: list[int] = tokenizer.encode(" ".join(texts)).ids
    return tokens


def packed_row(tokens: list[int], length: int, number: int, chance: random.Random) -> dict[str, Any]:
    """Return a row of examples of 16 tokens or more; the second half of each example is labelled."""
    lengths: list[int] = []
    while (left := length - sum(lengths)) >= 32:
        lengths.append(chance.randint(16, min(left - 16, 256)))
    lengths.append(left)
    begin = number * length % (len(tokens) - length)
    ids = tokens[begin : begin + length]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    labels = [-100] * length
    for start, size in zip(starts, lengths, strict=True):
        labels[start + size // 2 : start + size] = ids[start + size // 2 : start + size]
    return {
        "input_ids": ids,
        "labels": labels,
        "seq_lengths": lengths,
        "example_ids": [f"{number}/{i}" for i in range(len(lengths))],
        "origins": ["package:mendeleev"] * len(lengths),
        "starts": [0] * len(lengths),
    }


def peak_of_ranks(folder: Path) -> int:
    """Run the stage and return the peak resident memory of its largest rank, in bytes.

    Raises:
        SystemExit: The training run failed; its output is shown.
    """
    peak = 0
    with (folder / "sft.log").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.sft"],
            cwd=folder,
            # Compile DeepSpeed's operators once for all cases.
            env=environment(folder) | {"TORCH_EXTENSIONS_DIR": str(folder.parent / "torch-extensions")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            peak = max([peak, *ranks(process.pid)])
            time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit(f"{folder}: failed:\n{(folder / 'sft.log').read_text(encoding='utf-8')[-3000:]}")
    return peak


def ranks(pid: int) -> Iterator[int]:
    """Yield the peak memory so far of each rank among the descendants of a process, in bytes."""
    for child in psutil.Process(pid).children(recursive=True):
        try:
            command = child.cmdline()
            if "-m" in command and command[command.index("-m") + 1] == "tasks.sft.worker":
                yield high_water(child.pid)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue


def high_water(pid: int) -> int:
    """Return the peak resident memory of a process, in bytes; 0 if the process is ending."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    run_main(main)
