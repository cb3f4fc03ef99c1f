"""Checks of the sft stage that need a GPU: `make test-gpu`.

Each check trains a small model with random weights through `python -m tasks.sft`. Checks run in
parallel, each with its own time limit. Results are written after each check, so a time limit loses
nothing. Finally, losses are compared with those of another check, kernels are judged by their self-tests
and memory is compared with the plan. The machine needs neither pytest nor MLflow. `--rehearse` runs some
of the checks on a CPU.
"""

import argparse
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import about
from nightshift.core.errors import StageError
from nightshift.core.files import read_json, read_rows, write_json, write_rows
from nightshift.core.stage import run_main
from nightshift.data.schemas import GROUPED
from nightshift.tracking.spool import read_spool
from tasks.pack import ROWS
from tasks.sft.job import Job, read_job
from tasks.sft.machine import ATTENTION
from tasks.sft.memory import GIB, estimate, largest_batch
from tests.helpers.byte_base import make_byte_base
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import conversation, shipped_params

# Head size 64, as attention kernels expect; enough layers to matter, but loads within a second.
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Four layers of Llama-3-8B with its LM head and vocabulary, which dominate memory in a large model.
WIDE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
SECTION = {
    "strategy": "single",
    "num_processes": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "precision": "bf16",
    "attn_implementation": "sdpa",
    "save_steps": 100,
    "use_liger_kernel": False,
}
EXACT = {"precision": "fp32"}
FULL = {"adapter": None, "learning_rate": 1e-3}
LARGE = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-4, "attn_implementation": "auto"}
# No MLflow server listens here, so the spool keeps everything that is logged.
NO_TRACKER = "http://127.0.0.1:9"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Check:
    """One training run and its expected result.

    Attributes:
        name: Name of the check.
        changes: Overrides of the sft section.
        like: Check whose losses must match, or None.
        within: Relative tolerance of the losses.
        may_lack: Whether the run may be refused because this machine lacks a package.
        wide: Whether to train the wide model and compare its memory with the plan.
        attempts: Number of times that the run may request another attempt.
        on_cpu: Whether to hide the GPU from the run.
        environment: Additional environment variables.
        lengths: Lengths of the examples in each row, in tokens, or None for six short examples.
        seconds: Time limit in seconds.
    """

    name: str
    changes: dict[str, Any]
    like: str | None = None
    within: float = 1e-3
    may_lack: bool = False
    wide: bool = False
    attempts: int = 0
    on_cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    seconds: float = 90.0


def checks() -> Iterator[Check]:
    """Yield all checks, most valuable first."""
    yield Check("cpu-fp32", EXACT, on_cpu=True)
    yield Check("single-fp32", EXACT, like="cpu-fp32")
    yield Check("shipped", {"strategy": "zero2", "num_processes": "auto", "precision": "auto"})
    for kernel in [*ATTENTION["cuda"], "flex_attention", "xformers"]:
        changes = {"attn_implementation": kernel}
        # flex_attention compiles its kernels.
        kind: dict[str, Any] = {"within": 0.02, "may_lack": True, "seconds": 150 if "flex" in kernel else 90}
        yield Check(f"bf16-{kernel}", changes, like="bf16-sdpa", **kind)
        if kernel not in ("sdpa", "eager"):
            yield Check(f"full-bf16-{kernel}", {**FULL, **changes}, like="full-bf16", **kind)
    yield Check("full-bf16", FULL)
    for strategy in ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2"):
        yield Check(f"{strategy}-fp32", {**EXACT, "strategy": strategy}, like="single-fp32")
    yield Check("peft-fp32", {**EXACT, "lora_dropout": 1e-9}, like="single-fp32")
    yield Check("qlora", {"adapter": "qlora"}, may_lack=True)
    yield Check("qlora-zero2", {"adapter": "qlora", "strategy": "zero2"}, may_lack=True)
    for optim in ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "lion_32bit"):
        yield Check(optim, {"optim": optim}, may_lack=True)
    yield Check("adamw_torch_fused", {**EXACT, "optim": "adamw_torch_fused"}, like="single-fp32")
    yield Check("fp8-base", {"fp8_base": True}, like="bf16-sdpa", within=0.05, may_lack=True)
    yield Check("fp16", {"precision": "fp16"}, like="bf16-sdpa", within=0.05)
    yield Check("fp16-zero2", {"precision": "fp16", "strategy": "zero2"}, like="bf16-sdpa", within=0.05)
    yield Check("tf32", {"precision": "tf32"}, like="single-fp32", within=0.02)
    yield Check("liger", {"use_liger_kernel": True}, like="bf16-sdpa", within=0.02, may_lack=True)
    yield Check("checkpointing", {**EXACT, "activation_checkpointing": True}, like="single-fp32")
    offload = {**EXACT, "strategy": "zero2", "offload_optimizer": "cpu"}
    yield Check("zero2-offload", offload, like="single-fp32", seconds=150)
    offload |= {"strategy": "zero3", "offload_param": "cpu"}
    yield Check("zero3-offload", offload, like="single-fp32", seconds=150)
    free = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 0}
    yield Check("schedule-free", free, may_lack=True)
    yield Check("dora", {"use_dora": True})
    yield Check("neftune", {"neftune_noise_alpha": 5.0})
    yield Check("evaluation", {"eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True})
    yield Check("compile", {"torch_compile": True}, like="bf16-sdpa", within=0.02, seconds=150)
    little = {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.01"}
    many = {"per_device_train_batch_size": 4, "max_steps": 1, "warmup_steps": 0}
    yield Check("memory-retry", many, attempts=4, environment=little, lengths=(2048,), seconds=200)
    rows = (1024, 3072)
    for name, changes in {
        "wide": {},
        "wide-checkpointing": {"activation_checkpointing": True},
        "wide-zero2": {"strategy": "zero2"},
        "wide-liger": {"use_liger_kernel": True},
    }.items():
        may_lack = "liger" in name
        yield Check(name, {**LARGE, **changes}, wide=True, lengths=rows, may_lack=may_lack, seconds=120)


def rehearsal() -> Iterator[Check]:
    """Yield the checks that run on a CPU, one for each kind of comparison."""
    yield Check("cpu-fp32", EXACT, on_cpu=True)
    yield Check("single-fp32", EXACT, like="cpu-fp32", within=1e-6)
    yield Check("zero2-fp32", {**EXACT, "strategy": "zero2"}, like="single-fp32")
    yield Check("peft-fp32", {**EXACT, "lora_dropout": 1e-9}, like="single-fp32")
    yield Check(
        "fp32-flash_attention_4", {**EXACT, "attn_implementation": "flash_attention_4"}, may_lack=True
    )


def main(*, out: Path, work: Path, seconds: float, at_once: int, rehearse: bool, only: list[str]) -> None:
    """Run the checks, write gpu-checks.json and report the failed checks.

    Raises:
        StageError: A check failed, there is no GPU, or `only` names an unknown check.
    """
    if not rehearse and not torch.cuda.is_available():
        raise StageError("no NVIDIA GPU; --rehearse runs some of the checks on a CPU")
    deadline = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {check.name: check for check in (rehearsal() if rehearse else checks())}
    if unknown := [name for name in only if name not in known]:
        raise StageError(f"--only: no check is named {', '.join(unknown)}; known are {', '.join(known)}")
    wanted = [known[name] for name in select(known, only)]
    make_base(work / "small", SMALL, device)
    if any(check.wide for check in wanted):
        make_base(work / "wide", WIDE, device)
    results: dict[str, Any] = {}
    measured, lock = about(("torch", "transformers")), Lock()
    out.mkdir(parents=True, exist_ok=True)

    def run(check: Check) -> None:
        results[check.name] = train(check, work, deadline)
        result = results[check.name]
        summary = result.get("error", [f"losses {result['losses']}, {result['gib']:.2f} GiB"])[-1]
        log.info("%s: codes %s, %s s: %s", check.name, result["codes"], result["seconds"], summary)
        with lock:
            write_json(out / "gpu-checks.json", {**measured, "results": dict(results)})

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, wanted))
    found = [f"{check.name}: {fault}" for check in wanted if (fault := find_fault(check, results))]
    write_json(out / "gpu-checks.json", {**measured, "results": results, "found": found})
    if found:
        raise StageError("\n  ".join([f"{len(found)} of {len(wanted)} checks failed", *found]))


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu-checks.json")
    parser.add_argument("--work", type=Path, required=True, help="empty folder for the training runs")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit of all training runs")
    parser.add_argument("--at-once", type=int, default=8, help="number of training runs in parallel")
    parser.add_argument("--rehearse", action="store_true", help="run some of the checks on a CPU")
    parser.add_argument(
        "--only", nargs="+", default=[], help="run these checks, and those they are compared with"
    )


def select(known: Mapping[str, Check], only: Sequence[str]) -> list[str]:
    """Return the requested names, or all, in order, with those of the checks that they are compared with."""
    wanted = set(only or known)
    while more := {str(known[name].like) for name in wanted if known[name].like} - wanted:
        wanted |= more
    return [name for name in known if name in wanted]


def make_base(folder: Path, shape: dict[str, Any], device: str) -> None:
    """Write a base model with random weights, created on the device, and a byte-level tokenizer."""
    make_byte_base(folder / "model")
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**shape, bos_token_id=256, eos_token_id=257)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    write_json(folder / "base.json", {"model": "random", "files": {}})


def train(check: Check, work: Path, deadline: float) -> dict[str, Any]:
    """Train, repeat while the run requests another attempt, and return its results."""
    folder = work / check.name
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "base").symlink_to(work / ("wide" if check.wide else "small"))
    section = {**shipped_params(), **SECTION, **check.changes}
    (folder / "params.yaml").write_text(yaml.safe_dump({"sft": section}), encoding="utf-8")
    words = (WIDE if check.wide else SMALL)["vocab_size"]
    write_rows(folder / "data" / "pack" / "train.parquet", list(rows(check, words)), ROWS)
    write_rows(folder / "data" / "split" / "validation.parquet", [conversation(i) for i in range(3)], GROUPED)
    # All checks share the operators that DeepSpeed compiles.
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR") or str(ROOT / ".nightshift" / "torch-extensions")
    state = {
        "NIGHTSHIFT_HOME": str(folder / "state"),
        "MLFLOW_TRACKING_URI": NO_TRACKER,
        "TORCH_EXTENSIONS_DIR": compiled,
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if check.on_cpu else {}
    begin, codes = time.monotonic(), []
    for _ in range(check.attempts + 1):
        left = min(check.seconds, deadline - time.monotonic())
        if left < 1:
            codes.append("not started")
            break
        codes.append(run_stage(folder, {**state, **hidden, **check.environment}, left))
        if codes[-1] != 10:
            break
    return {"codes": codes, "seconds": round(time.monotonic() - begin, 1), **read_back(folder, check)}


def run_stage(folder: Path, more: dict[str, str], seconds: float) -> int | str:
    """Run the stage in a folder and return its exit code, or `time limit`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (folder / "log").open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.sft"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **more},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "time limit"


def rows(check: Check, words: int) -> Iterator[dict[str, Any]]:
    """Yield rows of random tokens; the second half of each example has labels."""
    chance = random.Random(0)
    for number in range(6 if check.wide else 24):
        lengths = list(check.lengths or (chance.randint(20, 90) for _ in range(6)))
        ids = chance.choices(range(300, words), k=sum(lengths))
        labels: list[int] = []
        for length in lengths:
            start = len(labels)
            labels += [-100] * (length // 2) + ids[start + length // 2 : start + length]
        yield {
            "input_ids": ids,
            "labels": labels,
            "seq_lengths": lengths,
            "example_ids": [f"{number}/{i}" for i in range(len(lengths))],
            "origins": ["random"] * len(lengths),
            "starts": [0] * len(lengths),
        }


def read_back(folder: Path, check: Check) -> dict[str, Any]:
    """Read the results of a training run: losses, memory, effective values, last log lines on error."""
    found: dict[str, Any] = {
        "losses": metric(folder, "loss"),
        "gib": max(metric(folder, "peak_memory_gib"), default=0),
    }
    for name in ("effective", "selftest"):
        file = next(folder.glob(f"state/checkpoints/*/output/{name}.json"), None)
        found[name] = read_json(file) if file else None
    if check.wide and (job := next(folder.glob("state/checkpoints/*/job.json"), None)):
        found["planned_gib"] = planned(folder, read_job(job))
    if not (folder / "data" / "sft" / "summary.json").is_file():
        found["error"] = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    return found


def metric(folder: Path, key: str) -> list[float]:
    """Return all values of a metric from the spool, by step."""
    entries = [entry for path in folder.glob("state/tracking/*.jsonl") for entry in read_spool(path)[1:]]
    logged = [entry for entry in entries if entry["kind"] == "metrics" and key in entry["values"]]
    return [entry["values"][key] for entry in sorted(logged, key=lambda entry: int(entry["step"]))]


def planned(folder: Path, job: Job) -> float:
    """Return the planned memory in GiB, without memory that torch's allocator does not see."""
    backend = job.backend
    params = job.params.model_copy(update={"attn_implementation": backend.attention})
    packed = read_rows(folder / "data" / "pack" / "train.parquet")
    tokens = [len(row["input_ids"]) for row in packed]
    labelled = [sum(label != -100 for label in row["labels"]) for row in packed]
    batch = largest_batch(job.plan.order, tokens, labelled, job.micro_batch_size)
    config = read_json(folder / "data" / "base" / "model" / "config.json")
    memory = estimate(config, params, backend.strategy, backend.precision, batch, backend.device)
    return round((memory.total - memory.overhead) / GIB, 3)


def find_fault(check: Check, results: dict[str, Any]) -> str | None:
    """Return why a check failed, or None."""
    result = results[check.name]
    if "error" in result:
        # An error may go on below its first line, as the list of what the machine lacks does.
        _, start, rest = "\n".join(["", *result["error"]]).rpartition("\nerror:")
        message = f"error:{rest}" if start else ""
        if check.may_lack and ("does not work on this machine" in message or " needs " in message):
            return None
        return f"codes {result['codes']}: {message or result['error'][-1:]}"
    if check.attempts and result["codes"][0] != 10:
        return f"codes {result['codes']}: never ran out of memory"
    if "proven" not in result["selftest"]["isolation"] and check.lengths is None:
        return "isolation is not proven"
    if check.like:
        others = results[check.like]["losses"]
        if not others:
            return f"{check.like} has no losses to compare"
        pairs = zip(result["losses"], others, strict=False)
        worst = max(abs(loss - other) / abs(other) for loss, other in pairs)
        if len(others) != len(result["losses"]) or worst > check.within:
            return f"losses differ by {worst:.2g} from those of {check.like}, more than {check.within}"
    if check.wide and not 0.9 <= result["planned_gib"] / result["gib"] <= 1.1:
        return f"{result['gib']:.2f} GiB were allocated, {result['planned_gib']:.2f} planned"
    return None


if __name__ == "__main__":
    run_main(main, declare)
