"""Run and measure data stages as the pipeline does, one process each."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nightshift.core.files import read_json

ROOT = Path(__file__).parent.parent
STAGES = ("ingest", "dedupe", "split", "augment", "decontaminate", "pack")


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one stage: wall-clock seconds, and peak resident memory in MiB."""

    seconds: float
    peak_mib: float


def make_folder(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Create a working folder with changed default parameters, the base and the benchmark."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in changes.items():
        params[section] |= values
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    run_stage("base", folder)
    (folder / "data" / "benchmarks").mkdir(parents=True)
    code = "from pathlib import Path; from tasks.snapshot.__main__ import write_benchmark as write; "
    code += "write('elements', 'package:mendeleev', Path('data/benchmarks'))"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(folder), check=True)


def run_stages(stages: Sequence[str], folder: Path) -> dict[str, Cost]:
    """Run stages in order, with their state in the folder."""
    return {stage: run_stage(stage, folder) for stage in stages}


def run_stage(stage: str, folder: Path) -> Cost:
    """Run one stage and return its cost.

    Raises:
        SystemExit: The stage failed; its output is shown.
    """
    start = time.perf_counter()
    with (folder / f"{stage}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"tasks.{stage}"],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{stage} failed:\n{(folder / f'{stage}.log').read_text(encoding='utf-8')[-3000:]}")
    return Cost(time.perf_counter() - start, usage.ru_maxrss / 1024)


def metric_history(folder: Path, key: str) -> list[Any]:
    """Return all values of a metric of the training run in a folder, by step."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / '.nightshift' / 'mlflow.db'}")
    run_id = read_json(folder / "data" / "sft" / "mlflow_run.json")["run_id"]
    return list(client.get_metric_history(run_id, key))


def environment(folder: Path) -> dict[str, str]:
    """Return a stage's environment: this checkout's code, the folder's state, no service addresses."""
    services = ("MLFLOW_", "PREFECT_", "NIGHTSHIFT_", "DVC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(services)}
    code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    state = str(folder / ".nightshift")
    return {**kept, "PYTHONPATH": code, "NIGHTSHIFT_HOME": state, "HF_HUB_OFFLINE": "1"}
