"""What happens beside the steps: checkpoints are closed, the plan is held, metrics are reported."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset as TrackedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from transformers import TrainerCallback

from tasks.errors import StageError
from tasks.sft import checkpoints

log = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """Close each checkpoint with its manifest once every rank has written its part."""

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Wait for all ranks, then let rank 0 write the manifest."""
        torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoints.close(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Progress(TrainerCallback):
    """Hold the run to its plan and tell how it goes: one line and one set of metrics per log."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.plan, self.run_id = job, job["plan"], job["run_id"]
        self.client = MlflowClient(job["tracking_uri"]) if job["run_id"] else None
        self.started = (time.monotonic(), 0)
        self.speed = 0.0

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start the clock; tell the run once what is trained, on which data."""
        self.started = (time.monotonic(), state.global_step)
        if self.client and state.is_world_process_zero:
            describe_run(self.client, self.job)

    def on_log(
        self,
        _args: Any,
        state: Any,
        _control: Any,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Check loss and learning rate, then report them.

        Raises:
            StageError: The loss is not finite, or the learning rate is not the planned one.
        """
        if "loss" not in logs:
            return
        step, loss, rate = state.global_step, logs["loss"], logs["learning_rate"]
        if not math.isfinite(loss):
            rows = self.plan["order"][(step - 1) * self.plan["rows_per_step"] :]
            raise StageError(
                f"sft: loss {loss} at step {step}, packed rows {rows[: self.plan['rows_per_step']]}; "
                "look at these rows in data/pack/train.parquet, or lower sft.learning_rate"
            )
        planned = self.plan["learning_rate"][step - 1]
        if not math.isclose(rate, planned, rel_tol=1e-6, abs_tol=1e-12):
            raise StageError(f"sft: learning rate {rate} at step {step}, but the plan says {planned}")
        if state.is_world_process_zero:
            self.report(step, loss, rate, logs["grad_norm"])

    def report(self, step: int, loss: float, rate: float, grad_norm: float) -> None:
        """Write one line, and send the metrics to the run."""
        begin, first = self.started
        seconds = time.monotonic() - begin
        self.speed = sum(self.plan["tokens"][first:step]) / seconds
        left = seconds / (step - first) * (self.plan["steps"] - step)
        log.info(
            "step %d/%d loss %.4f lr %.2e %.0f tok/s, %.0f s left",
            step, self.plan["steps"], loss, rate, self.speed, left,
        )  # fmt: skip
        if self.client:
            values = {
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens_per_second": self.speed,
                "supervised_tokens": self.plan["supervised_tokens"][step - 1],
            }
            now = int(time.time() * 1000)
            self.client.log_batch(
                self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()]
            )


def describe_run(client: MlflowClient, job: dict[str, Any]) -> None:
    """Log parameters and the data set with DVC's digest, unless a run that is resumed has them."""
    if client.get_run(job["run_id"]).data.params:
        return
    values = {f"sft.{key}": str(value) for key, value in job["params"].items()}
    values |= {"device": job["device"], "precision": job["precision"]}
    values |= {"steps": str(job["plan"]["steps"])}
    client.log_batch(job["run_id"], params=[Param(key, value) for key, value in values.items()])
    dataset = TrackedDataset(name="train", digest=job["data_digest"], source_type="local", source=job["rows"])
    tags = [InputTag("mlflow.data.context", "training"), InputTag("dvc.path", job["rows"])]
    client.log_inputs(job["run_id"], datasets=[DatasetInput(dataset, tags)])
