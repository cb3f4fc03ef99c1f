"""Run the stage: compile the plan, launch the ranks, accept the result by its marker."""

import importlib.metadata
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from tasks import supervise
from tasks.config import load_params
from tasks.encode import count_supervised
from tasks.errors import ConfigError, StageError
from tasks.files import file_digest, read_json, read_rows, text_digest, tree_digest, write_json
from tasks.sft import SftParams
from tasks.sft.plan import compile_plan
from tasks.stage import DATA, print_line, run_main, write_summary
from tasks.state import state_dir
from tasks.tracking import run_id, tracking_uri

BASE = DATA / "base" / "model"
ROWS = DATA / "pack" / "train.parquet"
TARGET = DATA / "sft"
ENGINES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")
log = logging.getLogger(__name__)


def main() -> None:
    """Train, or go on with a training of the same key, and copy out what it made."""
    params = load_params(SftParams, "sft")
    rows = read_rows(ROWS)
    lengths = [row["seq_lengths"] for row in rows]
    plan = compile_plan(params, lengths, [count_supervised(row["labels"]) for row in rows])
    device, precision = resolve_precision(params.precision)
    folder = state_dir() / "checkpoints" / training_key(params, device, precision)
    job = {
        "params": params.model_dump(),
        "plan": plan,
        "device": device,
        "precision": precision,
        "folder": str(folder),
        "base": str(BASE),
        "rows": str(ROWS),
        "data_digest": dvc_digest(ROWS),
        "tracking_uri": tracking_uri(),
        "run_id": run_id(MlflowClient(tracking_uri())),
    }
    if not is_finished(folder):
        launch(job, params.num_processes)
    publish(job, folder / "output")
    write_summary(
        "sft",
        rows_in=len(rows),
        rows_out=len(rows),
        steps=plan["steps"],
        tokens=sum(plan["tokens"]),
        tokens_supervised=sum(plan["supervised_tokens"]),
    )


def resolve_precision(requested: str) -> tuple[str, str]:
    """Return (device, precision) for this machine.

    Raises:
        ConfigError: bf16 was asked for and neither GPU nor CPU computes it natively.
    """
    import torch

    if torch.cuda.is_available():
        device, native = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, native = "cpu", "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if requested == "bf16" and not native:
        raise ConfigError(
            "params.yaml: sft.precision=bf16, but this machine has no bf16 instructions; set auto or fp32"
        )
    return device, "bf16" if native and requested != "fp32" else "fp32"


def training_key(params: SftParams, device: str, precision: str) -> str:
    """Digest of all that decides the result: code, rows, base, parameters, engine versions."""
    code = tree_digest(Path(__file__).parent)
    versions = [f"{name}={importlib.metadata.version(name)}" for name in ENGINES]
    base = file_digest(BASE.with_name("base.json"))
    return text_digest(code, file_digest(ROWS), base, params.model_dump_json(), device, precision, *versions)


def launch(job: dict[str, Any], processes: int) -> None:
    """Start the ranks under DeepSpeed's launcher and the supervisor, and wait.

    Raises:
        StageError: They ended without the success marker, whatever the exit code says.
    """
    folder = Path(job["folder"])
    (folder / "output").mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", job)
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        f"--num_gpus={processes}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
        "--no_local_rank",
        "--module",
        "tasks.sft.worker",
        str(folder / "job.json"),
    ]
    code = supervise.run(command, on_line=print_line, env=rank_environment(job["device"]))
    if not is_finished(folder):
        raise StageError(
            f"sft: the ranks ended with code {code} before their work was done; the reason stands "
            f"above. Run again: training goes on from the last checkpoint in {folder}"
        )


def rank_environment(device: str) -> dict[str, str]:
    """Build what the ranks need to know of the host."""
    bin_folder = str(Path(sys.executable).parent)
    env = {
        # DeepSpeed compiles its operators with ninja from the same environment.
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]),
        "PYTHONPATH": str(Path.cwd()),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
        or str(state_dir() / "torch-extensions"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # One thread for each rank makes the arithmetic, and so the adapter, reproducible.
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return env


def is_finished(folder: Path) -> bool:
    """Tell whether the success marker is there and the model is the one it names."""
    marker = folder / "output" / "finished.json"
    return marker.is_file() and bool(read_json(marker)["digest"] == tree_digest(folder / "output" / "model"))


def publish(job: dict[str, Any], output: Path) -> None:
    """Copy the result to data/sft; checkpoints are not needed any more."""
    shutil.rmtree(TARGET / "model", ignore_errors=True)
    shutil.copytree(output / "model", TARGET / "model")
    for name in ("effective.json", "selftest.json"):
        shutil.copyfile(output / name, TARGET / name)
    write_json(TARGET / "plan.json", job["plan"])
    marker = read_json(output / "finished.json")
    # Nothing depends on this file, so a run id and a speed may stand in it.
    write_json(
        TARGET / "mlflow_run.json",
        {"run_id": job["run_id"], "tokens_per_second": marker["tokens_per_second"]},
    )
    for checkpoint in output.parent.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def dvc_digest(path: Path) -> str:
    """Return DVC's digest of a stage output from dvc.lock, or the file's own outside DVC."""
    lock = Path("dvc.lock")
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    for stage in stages.values():
        for out in stage.get("outs", []):
            if out["path"] == path.as_posix():
                return str(out["md5"])
    return file_digest(path)


def free_port() -> int:
    """Find a free port on the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    run_main(main)
