"""Compare real tokens per second of one fine-tuning job here, in plain TRL, and in LLaMA-Factory.

SmolLM2-135M, LoRA of rank 16 on all linear layers, 400 chats of lognormal length, rows of at most 1024
tokens, one epoch, on the same cores one after the other. Real tokens are those of the chats; padding
never counts. TRL keeps its defaults; LLaMA-Factory packs, with masks that separate the examples.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from benchmarks.corpus import lognormal_chats
from benchmarks.record import Record, record
from benchmarks.stages import ROOT, environment, metric_history, run_stage
from nightshift.core.files import read_json, read_rows, write_json, write_rows
from nightshift.data.schemas import AUGMENTED, GROUPED

CHATS, LENGTH, BATCH = 400, 1024, 8
LEARNING_RATE = 1e-4
PEER = "llamafactory==0.9.5"
SFT: dict[str, Any] = {
    "strategy": "auto",
    "num_processes": 2,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "lora_r": 16,
    "lora_alpha": 32,
}
log = logging.getLogger(__name__)


def make_job(folder: Path, *, packing: bool) -> None:
    """Create a folder with the chats, the base and the packed rows, ready for the stage sft."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["pack"] |= {"packing": packing, "max_length": LENGTH, "over_length": "error"}
    # As many chats per step as in TRL, packed or not.
    params["sft"] |= SFT | {"per_device_train_batch_size": 1 if packing else BATCH // SFT["num_processes"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    rows = [
        {
            "id": f"{i:04}",
            "messages": [{**turn, "tool_calls": None, "name": None} for turn in chat["messages"]],
            "tools": None,
            "source": "chats",
            "origin": f"chats/000001.jsonl:{i + 1}",
            "arrival": 1,
            "group_id": str(i),
            "parent_id": None,
            "style": None,
            "ordinal": None,
        }
        for i, chat in enumerate(lognormal_chats(CHATS, seed=0))
    ]
    write_rows(folder / "data" / "decontaminate" / "train.parquet", rows, AUGMENTED)
    # The stage requires this file, but does not evaluate here.
    write_rows(folder / "data" / "split" / "validation.parquet", [], GROUPED)
    for stage in ("base", "pack"):
        run_stage(stage, folder)


@dataclass(frozen=True, slots=True)
class Training:
    """Measurements of one training run.

    Attributes:
        tokens_per_second: Real tokens per second, from the first step to the last.
        seconds: Wall-clock seconds of the whole program.
        padding_share: Share of the computed tokens that were padding, 0 to 1.
        losses: Loss of each step, in nats per token.
        cpu_shares: CPU seconds over seconds of each rank; far below 1 if other programs slowed it down.
    """

    tokens_per_second: float
    seconds: float
    padding_share: float
    losses: Sequence[float] = ()
    cpu_shares: Sequence[float] = ()


def compare(folder: Path, job: Path, ours: Training) -> list[Record]:
    """Train the job of a folder in the other programs, and compare their throughput with ours.

    Args:
        folder: Empty working folder.
        job: Folder of the trained job, with its packed rows.
        ours: Measurements of that training run.
    """
    pack = read_json(job / "data" / "pack" / "summary.json")
    alone = folder / "alone"
    alone.mkdir()
    make_job(alone, packing=False)
    same_batches = train_here(alone)
    log.info("ours, on the batches of TRL: %.1f tokens/s", same_batches.tokens_per_second)
    trl = run_trl(folder / "trl", alone, pack["tokens_out"])
    log.info("TRL: %.1f tokens/s", trl.tokens_per_second)
    trainings = {"ours": ours, "ours, on the batches of TRL": same_batches, "trl": trl}
    if peer := run_llamafactory(folder / "llamafactory", job, pack["tokens_out"]):
        trainings["llamafactory"] = peer
    about: dict[str, Any] = {
        "tokens": pack["tokens_out"],
        "supervised_share": round(pack["tokens_supervised"] / pack["tokens_out"], 4),
        "packing_efficiency": pack["efficiency"],
        "cores": len(os.sched_getaffinity(0)),
        "trainings": {name: {**asdict(one), "losses": None} for name, one in trainings.items()},
    }
    records = [
        record(
            f"real tokens/s against {name}",
            ours.tokens_per_second / trainings[name].tokens_per_second,
            "x",
            at_least=bound,
            **about,
        )
        for name, bound in {"trl": 2.0, "llamafactory": 1.8}.items()
        if name in trainings
    ]
    apart = [abs(a / b - 1) for a, b in zip(same_batches.losses, trl.losses, strict=True)]
    # bf16 has eight bits of precision: a unit in the last place is 1/256.
    claim = "loss of a step against plain TRL on the same batches, mean of all steps"
    losses = {"ours": same_batches.losses, "trl": trl.losses}
    curve = record(claim, mean(apart), "relative", at_most=1 / 256, largest=max(apart), losses=losses)
    return [*records, curve]


def train_here(job: Path) -> Training:
    """Train with only the stage sft, without flow and DVC."""
    cost = run_stage("sft", job)
    losses = [metric.value for metric in metric_history(job, "loss")]
    return Training(speed(job), cost.seconds, 0.0, losses, cpu_shares(job))


def speed(folder: Path) -> float:
    """Return the real tokens per second of a training run, from its first step to its last."""
    return float(read_json(folder / "data" / "sft" / "mlflow_run.json")["tokens_per_second"])


def cpu_shares(folder: Path) -> list[float]:
    """Return the CPU seconds over seconds of each rank of a training run."""
    shares: list[float] = read_json(folder / "data" / "sft" / "mlflow_run.json")["cpu_shares"]
    return shares


def run_trl(folder: Path, job: Path, tokens: int) -> Training:
    """Train with plain TRL on the rows of a job, in its order; `tokens` is their expected total."""
    folder.mkdir()
    known = read_rows(job / "data" / "pack" / "train.parquet")
    rows = [known[i] for i in read_json(job / "data" / "sft" / "plan.json")["order"]]
    settings = {
        "model": str(job / "data" / "base" / "model"),
        # TRL's own mask also trains the template's newline after the end of a turn.
        "rows": [{key: row[key] for key in ("input_ids", "labels")} for row in rows],
        "max_length": LENGTH,
        "learning_rate": LEARNING_RATE,
        "lora_r": SFT["lora_r"],
        "lora_alpha": SFT["lora_alpha"],
    }
    write_json(folder / "settings.json", settings)
    script = str(Path(__file__).with_name("plain_trl.py"))
    seconds = run_program([sys.executable, script, "settings.json"], folder)
    result = read_json(folder / "result.json")
    if result["tokens"] != tokens:
        raise SystemExit(f"TRL trained on {result['tokens']} tokens instead of {tokens}: not the same job")
    lengths = [len(row["input_ids"]) for row in rows]
    computed = sum(BATCH * max(lengths[at : at + BATCH]) for at in range(0, CHATS, BATCH))
    padding = round(1 - tokens / computed, 4)
    return Training(round(tokens / result["train_seconds"], 1), seconds, padding, result["losses"])


def run_llamafactory(folder: Path, job: Path, tokens: int) -> Training | None:
    """Train with LLaMA-Factory in a separate environment; return None if it cannot be installed."""
    folder.mkdir()
    if not install_llamafactory(folder):
        return None
    chats = [{"messages": chat["messages"]} for chat in lognormal_chats(CHATS, seed=0)]
    write_json(folder / "chats.json", chats)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages"}
    about = {"file_name": "chats.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    write_json(folder / "dataset_info.json", {"chats": about})
    settings = {
        **{"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all"},
        **{"lora_rank": SFT["lora_r"], "lora_alpha": SFT["lora_alpha"]},
        **{"model_name_or_path": str(job / "data" / "base" / "model"), "template": "smollm2"},
        **{"dataset_dir": ".", "dataset": "chats", "cutoff_len": LENGTH, "neat_packing": True},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 1},
        **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "bf16": True, "use_cpu": True},
        **{"output_dir": "out", "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
        **{"include_num_input_tokens_seen": "all"},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    program = str(folder / "venv" / "bin" / "llamafactory-cli")
    seconds = run_program([program, "train", "settings.yaml"], folder)
    results = read_json(folder / "out" / "all_results.json")
    padding = round(1 - tokens / results["num_input_tokens_seen"], 4)
    return Training(round(tokens / results["train_runtime"], 1), seconds, padding)


def install_llamafactory(folder: Path) -> bool:
    """Install LLaMA-Factory with this environment's torch release; return whether that succeeded."""
    python = str(folder / "venv" / "bin" / "python")
    release = torch.__version__.partition("+")[0]
    commands = [
        [sys.executable, "-m", "venv", "venv"],
        [python, "-m", "pip", "install", "--quiet", f"torch=={release}"],
        [python, "-m", "pip", "install", "--quiet", f"torch=={release}", PEER],
        # Built for another torch release, they fail on import. Training on text needs neither.
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
    ]
    for command in commands:
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        if done.returncode:
            log.warning("LLaMA-Factory could not be installed: %s", done.stderr[-500:])
            return False
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # LLaMA-Factory always imports torchaudio.
    (packages / "torchaudio.py").touch()
    return True


def run_program(command: Sequence[str], folder: Path) -> float:
    """Run a program and return its wall-clock seconds.

    Raises:
        SystemExit: The program failed; its output is shown.
    """
    start = time.perf_counter()
    output = folder / "output.log"
    with output.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{output.read_text(encoding='utf-8')[-3000:]}")
    return time.perf_counter() - start
