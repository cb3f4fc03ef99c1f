"""Report training progress: one line and one set of metrics per log entry."""

import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from nightshift.tracking.spool import Spool
from tasks.sft.job import Job

# Name of the dataset of each stage in the run.
DATASETS = {"sft": "train", "prefer": "preferences"}
# TRL's metrics of preference tuning.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
log = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Report from rank 0 to the terminal and the MLflow run, without waiting for MLflow."""

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, job.plan
        self.spool: Spool | None = None
        self.started = (time.monotonic(), 0)
        self.cpu_started = time.process_time()
        self.speed = 0.0

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start the clock; log the parameters and the dataset to the run."""
        self.started = (time.monotonic(), state.global_step)
        self.cpu_started = time.process_time()
        if state.is_world_process_zero:
            assert self.job.spool
            self.spool = Spool(self.job.spool, self.job.tracking_uri)
            self.spool.log("params", values=run_params(self.job))
            self.spool.log(
                "dataset",
                name=DATASETS[self.job.stage],
                digest=self.job.data_digest,
                source=str(self.job.data),
            )

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        """Report a training step or an evaluation."""
        if not self.spool:
            return
        step = state.global_step
        if "loss" in logs:
            # DeepSpeed reports no gradient norm under ZeRO-0 in full precision.
            keys = [key for key in ("loss", "learning_rate", "grad_norm", *REWARDS) if key in logs]
            # The gradient norm of a step skipped by the fp16 scaler is infinite.
            values: dict[str, float] = {key: float(logs[key]) for key in keys if math.isfinite(logs[key])}
            self.spool.log("metrics", values=self.named(values | self.measure(step, values)), step=step)
        elif "eval_loss" in logs:
            log.info("step %d/%d eval_loss %.4f", step, self.plan.steps, logs["eval_loss"])
            keys = [key for key in ("eval_loss", *(f"eval_{name}" for name in REWARDS)) if key in logs]
            self.spool.log("metrics", values=self.named({key: float(logs[key]) for key in keys}), step=step)

    def named(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return metrics under the names in the run; those of a second training have its stage in front."""
        before = "" if self.job.stage == "sft" else f"{self.job.stage}/"
        return {f"{before}{key}": value for key, value in values.items()}

    def measure(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Log the progress line of a step, and return its metrics other than `values`."""
        begin, first = self.started
        seconds = time.monotonic() - begin
        self.speed = sum(self.plan.tokens[first:step]) / seconds
        supervised = sum(self.plan.supervised_tokens[first:step]) / seconds
        memory = peak_memory(self.job.backend.device)
        left = seconds / (step - first) * (self.plan.steps - step)
        norm = f"{values['grad_norm']:.2e}" if "grad_norm" in values else "n/a"
        log.info(
            "step %d/%d loss %.4f lr %.2e grad %s %.0f tok/s, %.0f supervised, "
            "%.2f GiB, %.0f s left, ends %s",
            step, self.plan.steps, values["loss"], values["learning_rate"], norm,
            self.speed, supervised, memory, left, format_time(time.time() + left),
        )  # fmt: skip
        return {
            "tokens_per_second": self.speed,
            "supervised_tokens_per_second": supervised,
            "supervised_tokens": float(self.plan.supervised_tokens[step - 1]),
            "peak_memory_gib": memory,
        }

    def cpu_share(self) -> float:
        """Return the CPU seconds of this rank over the seconds since training began.

        On a CPU that other programs use too, it falls far below 1, and the speed with it.
        """
        seconds = time.monotonic() - self.started[0]
        return round((time.process_time() - self.cpu_started) / seconds, 2)

    def log_cpu_shares(self, shares: Sequence[float], step: int) -> None:
        """Log the CPU seconds over seconds of all ranks to the run."""
        if self.spool:
            values = {f"cpu_share/{rank}": share for rank, share in enumerate(shares)}
            self.spool.log("metrics", values=self.named(values), step=step)

    def close(self) -> None:
        """Send pending entries to MLflow one last time; the spool keeps the rest for later."""
        if self.spool:
            self.spool.close()


def format_time(moment: float) -> str:
    """Format a Unix time in seconds as weekday and local time."""
    return time.strftime("%a %H:%M", time.localtime(moment))


def run_params(job: Job) -> dict[str, str]:
    """Return the job parameters to log to the run."""
    values = {f"{job.stage}.{key}": str(value) for key, value in job.params.model_dump().items()}
    if job.stage != "sft":
        return values
    return values | {
        "device": job.backend.device,
        "precision": job.backend.precision,
        "steps": str(job.plan.steps),
    }


def peak_memory(device: str) -> float:
    """Return the peak memory of this process in GiB: tensors on the GPU, else resident memory."""
    if device == "cpu":
        # Linux reports KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30
