"""Tell how a training goes: one line and one set of metrics for each log."""

import logging
import time
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset as TrackedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from transformers import TrainerCallback

log = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """One line and one set of metrics for each log."""

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
        """Report a training step."""
        if "loss" not in logs:
            return
        step, loss, rate = state.global_step, logs["loss"], logs["learning_rate"]
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
