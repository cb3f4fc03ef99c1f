"""A training run in its folder: whether it has finished, where it logs to, and what is kept of it."""

import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from nightshift.core.files import file_digest, read_json, read_state, tree_digest, write_json
from nightshift.core.paths import EFFECTIVE, PLAN, SELFTEST, TRAINING_RUN
from nightshift.core.state import state_dir
from nightshift.tracking import spool
from tasks.sft import SftParams
from tasks.sft.backend import Backend
from tasks.sft.checkpoints import SAVING
from tasks.sft.job import Job


def resolve_auto(params: SftParams, backend: Backend) -> SftParams:
    """Return the parameters with `auto` replaced by the backend's choice."""
    names = ("activation_checkpointing", "num_processes", "use_liger_kernel")
    return params.model_copy(update={name: getattr(backend, name) for name in names})


def resolve_intervals(params: SftParams, steps: int) -> SftParams:
    """Return the parameters with shares of all steps replaced by steps, rounded up as in transformers.

    The best model needs a checkpoint at each evaluation, so that interval is then a multiple of the other.
    """
    saving, evaluation = params.save_steps, params.eval_steps
    if isinstance(saving, float):
        saving = math.ceil(saving * steps)
    if isinstance(evaluation, float):
        evaluation = math.ceil(evaluation * steps)
        if params.load_best_model_at_end and params.eval_steps:
            evaluation = saving * round(params.eval_steps / params.save_steps)
    return params.model_copy(update={"save_steps": saving, "eval_steps": evaluation})


def open_spool(folder: Path, is_trained: bool) -> Path:  # noqa: FBT001 - a value, not a mode
    """Return the spool of a training run: the previous attempt's, or one for this night's MLflow run.

    Args:
        folder: Folder of the training run.
        is_trained: Whether training has finished; the run that trained is then kept.
    """
    file = folder / "job.json"
    # Each stage that trains has jobs of its own type.
    job = read_state(file)
    before = Path(job["spool"]) if job and job["spool"] else None
    if before and is_trained:
        return before
    return spool.begin(state_dir() / "tracking", folder.name, os.environ.get("MLFLOW_RUN_ID") or None, before)


def is_finished(folder: Path) -> bool:
    """Return whether the success marker exists and matches the saved model."""
    marker = read_state(folder / "output" / "finished.json")
    return marker is not None and bool(marker["digest"] == tree_digest(folder / "output" / "model"))


def publish(job: Job, spool_file: Path, model: Path, record: Path) -> None:
    """Copy the result to the data of the stage, and delete the checkpoints and the rows of the ranks.

    Args:
        job: Finished job.
        spool_file: Spool of its MLflow run.
        model: Folder of the model.
        record: Folder of plan.json, effective.json, selftest.json and mlflow_run.json.
    """
    folder, output = job.folder, job.folder / "output"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(output / "model", model)
    for name in (EFFECTIVE.name, SELFTEST.name):
        shutil.copyfile(output / name, record / name)
    write_json(record / PLAN.name, asdict(job.plan))
    marker = read_json(output / "finished.json")
    spool.finish(spool_file)
    spool.replay(spool_file.parent, job.tracking_uri)
    # No stage depends on this file, so it may contain a run id and a speed. Without an id the run does
    # not exist yet, and can be found later by its key.
    run = {"run_id": spool.find_run_id(spool_file), "tracking_key": spool_file.stem}
    write_json(
        record / TRAINING_RUN.name, run | {key: marker[key] for key in ("tokens_per_second", "cpu_shares")}
    )
    for checkpoint in [*folder.glob("checkpoint-*"), folder / SAVING]:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for path in filter(None, (job.rows, job.eval_rows)):
        path.unlink(missing_ok=True)


def dvc_digest(path: Path) -> str:
    """Return DVC's digest of a stage output from dvc.lock, or half the file's own digest outside DVC.

    MLflow accepts 36 characters at most; a DVC digest has 32.
    """
    lock = Path("dvc.lock")
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    for stage in stages.values():
        for out in stage.get("outs", []):
            if out["path"] == path.as_posix():
                return str(out["md5"])
    return file_digest(path)[:32]
