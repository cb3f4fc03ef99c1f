"""Helpers for tests of the sft stage: a folder with a small model and few rows, and short parameters."""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nightshift.core.files import read_json, write_json, write_rows
from nightshift.data.schemas import GROUPED
from tasks.pack import ROWS
from tasks.sft import SftParams
from tasks.sft.backend import Backend
from tasks.sft.job import Job
from tasks.sft.plan import Plan
from tests.helpers.checkouts import ROOT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SHORT = {
    "num_processes": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "precision": "fp32",
    "attn_implementation": "sdpa_per_example",
    "save_steps": 1,
}
# Three steps of one process in full precision, each over all eight examples in four rows.
WHOLE_SET = {
    "strategy": "single",
    "num_processes": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "precision": "fp32",
    "attn_implementation": "sdpa_per_example",
    "save_steps": 100,
}
# The backend that a machine without a GPU chooses for one process.
BACKEND = Backend(
    device="cpu",
    devices=(),
    num_processes=1,
    precision="fp32",
    attention="sdpa",
    strategy="single",
    reason="one process",
    loss="chunked",
    lora="fused",
    activation_checkpointing=False,
    use_liger_kernel=False,
)
LENGTHS = (9, 31, 14, 40, 22, 27, 11, 36)


def sft_params(**changes: Any) -> SftParams:
    """Return the shipped parameters, shortened, with changes."""
    return SftParams(**{**shipped_params(), **SHORT, **changes})


def make_job(params: SftParams, **backend: Any) -> Job:
    """Return a two-step job as the stage writes it, with changes to the backend."""
    return Job(
        requested=params,
        params=params,
        backend=replace(BACKEND, **backend),
        plan=Plan(2, 2, 0, [0, 1, 2, 3], [9, 8], [3, 2], [0.1, 0.1]),
        visible="all",
        micro_batch_size=1,
        accumulation_steps=1,
        folder=Path("training"),
        base=Path("base"),
        rows=Path("rows.parquet"),
        eval_rows=None,
        data_digest="0" * 32,
        tracking_uri="http://127.0.0.1:9",
    )


def shipped_params() -> dict[str, Any]:
    """Return the sft section of params.yaml."""
    section: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sft"]
    return section


def make_folder(folder: Path, base: Path, rows: Sequence[Sequence[int]] = ((0,), (1,), (2,))) -> Path:
    """Fill a folder with all inputs of `python -m tasks.sft`.

    Args:
        folder: Folder to fill.
        base: Folder of the base model.
        rows: Numbers of the examples (indices into `LENGTHS`) in each packed row.
    """
    shutil.copytree(base, folder / "data" / "base" / "model")
    write_json(folder / "data" / "base" / "base.json", {"files": {}, "model": str(base)})
    write_rows(folder / "data" / "pack" / "train.parquet", [packed_row(row) for row in rows], ROWS)
    write_rows(folder / "data" / "split" / "validation.parquet", [conversation(i) for i in range(3)], GROUPED)
    return folder


def packed_row(numbers: Sequence[int]) -> dict[str, Any]:
    """Return a row of examples with random tokens; the second half of each example has labels."""
    row: dict[str, Any] = {key: [] for key in ROWS.names}
    for number in numbers:
        length = LENGTHS[number]
        ids = random.Random(number).choices(range(100, 2000), k=length)
        row["input_ids"] += ids
        row["labels"] += [-100] * (length // 2) + ids[length // 2 :]
        row["seq_lengths"].append(length)
        row["example_ids"].append(str(number))
        row["origins"].append(f"made/000001.jsonl:{number + 1}")
        row["starts"].append(0)
    return row


def conversation(number: int) -> dict[str, Any]:
    """Return an example of the validation set."""
    turns = {"user": f"What is {number}?", "assistant": f"It is the number {number} and no other."}
    messages = [
        {"role": role, "content": content, "tool_calls": None, "name": None}
        for role, content in turns.items()
    ]
    keys = ("id", "source", "origin", "group_id")
    return {"messages": messages, "tools": None, "arrival": 1, **{key: str(number) for key in keys}}


def run_sft(
    folder: Path, environment: Mapping[str, str], state: str, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """Run the stage as a program with its own state and changes to the sft section."""
    process = start_sft(folder, environment, state, **changes)
    output, _ = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def start_sft(
    folder: Path,
    environment: Mapping[str, str],
    state: str,
    before: Callable[[], None] | None = None,
    **changes: Any,
) -> subprocess.Popen[str]:
    """Start the stage with piped output; `before` is called first, in its process.

    POISON in the environment injects a fault into the ranks; see `tests.helpers.poisoned`.
    """
    section = {**shipped_params(), **WHOLE_SET, **changes}
    params = {"sft": section, "registry": {"experiment": "nightshift"}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.poisoned" if "POISON" in environment else "tasks.sft"],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "NIGHTSHIFT_HOME": str(folder / state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,
    )


def only_run(uri: str) -> "tuple[MlflowClient, Run]":
    """Return a client of the MLflow server and its only run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("nightshift")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def history(folder: Path, state: str, key: str = "loss") -> list[float]:
    """Return all values of a metric of the last training run, by step."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / state / 'mlflow.db'}")
    run_id = read_json(folder / "data" / "sft" / "mlflow_run.json")["run_id"]
    return [metric.value for metric in client.get_metric_history(run_id, key)]
