"""Measure the overhead of flow, DVC and supervisor against the same job with the launcher alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import Record, record
from benchmarks.stages import ROOT, environment
from benchmarks.throughput import Training, cpu_shares, make_job, speed
from nightshift.core.files import read_json, tree_digest
from nightshift.core.ports import free_port
from nightshift.tracking import spool
from tasks.sft.job import Job, read_job
from tasks.sft.launch import build_command, rank_environment
from tasks.sft.rows import iterate_row_groups, write_mapped

TRAINING_SECONDS = 600.0
FLOW = """
import os
from infra.local.settings import environment
from infra.local.stack import read_stack
from nightshift.core.state import state_dir
os.environ.update(environment(read_stack(state_dir())))
from prefect import flow
from flows.stages import run_stage
from flows.tracking import tracked_run

@flow
def train() -> None:
    with tracked_run(has_changed=True) as run_id:
        run_stage("sft", run_id)

train()
"""


def measure(folder: Path) -> tuple[Path, Training, Record]:
    """Train the packed job both ways.

    Returns:
        Folder of the job, measurements of its training run through the flow, and the record.
    """
    job = folder / "job"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(job)], check=True)
    make_job(job, packing=True)
    ports = {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    shell = environment(job) | ports | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    nightshift = [str(Path(sys.executable).with_name("nightshift"))]
    subprocess.run([*nightshift, "up"], cwd=job, env=shell, check=True)
    try:
        through_flow = timed([sys.executable, "-c", FLOW], job, shell)
        flow_speed, shares = speed(job), cpu_shares(job)
        bare, bare_job = bare_training(job)
        alone = timed(bare, job, shell | rank_environment("cpu", []))
    finally:
        subprocess.run([*nightshift, "down"], cwd=job, env=shell, check=True)
    marker = read_json(bare_job.folder / "output" / "finished.json")
    if marker["digest"] != tree_digest(job / "data" / "sft" / "model"):
        raise SystemExit("the two training runs differ and cannot be compared")
    bare_speed = marker["tokens_per_second"]
    tokens = sum(bare_job.plan.tokens)
    around = (through_flow - tokens / flow_speed) - (alone - tokens / bare_speed)
    added = (bare_speed / flow_speed - 1) + around / TRAINING_SECONDS
    claim = record(
        "flow, DVC and supervisor around a training of 10 minutes",
        added,
        "share",
        at_most=0.03,
        seconds={"through the flow": through_flow, "launcher alone": alone},
        tokens_per_second={"through the flow": flow_speed, "launcher alone": bare_speed},
        cpu_shares={"through the flow": shares, "launcher alone": marker["cpu_shares"]},
        seconds_around_the_steps=around,
    )
    return job, Training(flow_speed, through_flow, 0.0, (), shares), claim


def bare_training(job: Path) -> tuple[list[str], Job]:
    """Build the launcher command that trains the flow's job again from the start, in another folder."""
    (file,) = (job / ".nightshift" / "checkpoints").glob("*/job.json")
    bare = job / "bare"
    (bare / "output").mkdir(parents=True)
    files = {"folder": bare, "rows": bare / "rows.arrow", "spool": spool.begin(bare, "bare", None)}
    spec = read_job(file).model_copy(update=files)
    write_mapped(spec.rows, iterate_row_groups(job / "data" / "pack" / "train.parquet"))
    spec.write(bare / "job.json")
    return [*build_command(spec, "127.0.0.1", free_port()), str(bare / "job.json")], spec


def timed(command: list[str], folder: Path, shell: dict[str, str]) -> float:
    """Run a command and return its seconds.

    Raises:
        SystemExit: The command failed; its output is shown.
    """
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=shell, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - start
