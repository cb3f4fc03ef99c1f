"""One rank of the training. Launched by DeepSpeed; reads its job file and nothing else.

Rank 0 writes effective.json, selftest.json, the adapter, and last of all the success marker.
"""

import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from mlflow import MlflowClient
from mlflow.entities import Dataset as TrackedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from tasks import supervise
from tasks.errors import StageError
from tasks.files import read_json, read_rows, tree_digest, write_json
from tasks.pack import IGNORED
from tasks.sft import SftParams, checkpoints, selftest
from tasks.sft.plan import FILLER, deepspeed_config
from tasks.stage import run_main

log = logging.getLogger(__name__)


def main() -> None:
    """Train the job named on the command line."""
    # Without its launcher a rank would wait for the others for ever.
    supervise.die_with_parent()
    job = read_json(Path(sys.argv[-1]))
    params = SftParams.model_validate(job["params"])
    folder = Path(job["folder"])
    # The seed comes before the adapter's weights are drawn.
    set_seed(params.seed)
    progress = Progress(job)
    trainer = build_trainer(job, params, [Checkpoints(), progress])
    trainer.remove_callback(PrinterCallback)
    proof = prove(trainer)
    resume = checkpoints.find_newest(folder)
    if trainer.is_world_process_zero():
        write_json(folder / "output" / "effective.json", effective(trainer, job))
        write_json(folder / "output" / "selftest.json", proof)
        log.info("isolation proven; %s", f"going on from {resume.name}" if resume else "step 1")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finish(trainer, job, progress)


class Trainer(SFTTrainer):
    """TRL's trainer with logits only where a label asks for them.

    Off a GPU, TRL's fused head scores every position: with three quarters of the tokens unsupervised
    that is a third of the step. The value is the same token-weighted mean.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - transformers' signature
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the negative log-likelihoods over the labelled tokens of the whole step."""
        labels = inputs.pop("labels")[0, 1:]
        keep = (labels != IGNORED).nonzero().squeeze(-1)
        outputs = model(**inputs, use_cache=False, logits_to_keep=keep)
        total = cross_entropy(outputs.logits[0].float(), labels[keep], reduction="sum")
        # Every rank's gradient is averaged, but num_items_in_batch counts the tokens of all ranks.
        loss = total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, outputs) if return_outputs else loss


def build_trainer(job: dict[str, Any], params: SftParams, callbacks: list[TrainerCallback]) -> SFTTrainer:
    """Build TRL's trainer on the packed rows, in the order of the plan."""
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = AutoModelForCausalLM.from_pretrained(
        job["base"],
        dtype=torch.bfloat16 if job["precision"] == "bf16" else torch.float32,
        attn_implementation=params.attn_implementation,
        trust_remote_code=False,
    )
    lora = LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return Trainer(
        model=get_peft_model(model, lora),
        args=training_arguments(job, params),
        train_dataset=planned_rows(Path(job["rows"]), job["plan"]["order"], tokenizer.eos_token_id),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def training_arguments(job: dict[str, Any], params: SftParams) -> SFTConfig:
    """Translate our parameters to TRL's; everything it would do in silence is switched off."""
    return SFTConfig(
        output_dir=job["folder"],
        max_steps=job["plan"]["steps"],
        per_device_train_batch_size=params.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        learning_rate=params.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(
            params.lr_scheduler_type, params.lr_scheduler_type
        ),
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim="adamw_torch",
        bf16=job["precision"] == "bf16",
        use_cpu=job["device"] == "cpu",
        deepspeed=deepspeed_config(params, job["precision"]),
        activation_checkpointing=False,
        # The rows are packed and shuffled by the plan.
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=True,
        packing=False,
        max_length=None,
        save_strategy="steps",
        save_steps=params.save_steps,
        save_total_limit=2,
        logging_steps=params.logging_steps,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=params.seed,
        data_seed=params.seed,
    )


def planned_rows(path: Path, order: list[int], filler_token: int) -> Dataset:
    """Lay out the rows in the order of the plan; a filler is two tokens without a label."""
    rows = read_rows(path)
    filler = {"input_ids": [filler_token] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}
    columns = ("input_ids", "labels", "seq_lengths")
    planned = [filler if i == FILLER else rows[i] for i in order]
    return Dataset.from_list([{column: row[column] for column in columns} for row in planned])


def prove(trainer: SFTTrainer) -> dict[str, Any]:
    """Run the self-test on the first two examples of the first row that holds two."""
    for row in trainer.train_dataset:
        if len(row["seq_lengths"]) > 1 and any(
            label != IGNORED for label in row["labels"][: sum(row["seq_lengths"][:2])]
        ):
            first, second = row["seq_lengths"][:2]
            short = {k: row[k][: first + second] for k in ("input_ids", "labels")}
            batch = trainer.data_collator([{**short, "seq_lengths": [first, second]}])
            batch = {k: v.to(trainer.args.device) if hasattr(v, "to") else v for k, v in batch.items()}
            return selftest.run(trainer.model.to(trainer.args.device), batch, first)
    return {"isolation": {"proven": True, "reason": "no row holds two examples"}}


def effective(trainer: SFTTrainer, job: dict[str, Any]) -> dict[str, Any]:
    """Set what was requested beside what runs.

    Raises:
        StageError: The two differ.
    """
    params = job["params"]
    runs = {
        "attn_implementation": trainer.model.config._attn_implementation,
        "num_processes": trainer.args.world_size,
        "zero_stage": trainer.accelerator.state.deepspeed_plugin.zero_stage,
    }
    table = {key: {"requested": params[key], "effective": value} for key, value in runs.items()}
    if different := [key for key, row in table.items() if row["requested"] != row["effective"]]:
        raise StageError(f"sft: requested and effective differ: {[table[k] for k in different]}")
    table["precision"] = {"requested": params["precision"], "effective": job["precision"]}
    table["device"] = {"requested": "auto", "effective": job["device"]}
    return table


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


def finish(trainer: SFTTrainer, job: dict[str, Any], progress: "Progress") -> None:
    """Save the adapter and, as the last act, the success marker.

    Raises:
        StageError: The training ended before its plan did.
    """
    if trainer.state.global_step != job["plan"]["steps"]:
        raise StageError(
            f"sft: ended at step {trainer.state.global_step} of {job['plan']['steps']}; run again"
        )
    output = Path(job["folder"]) / "output"
    shutil.rmtree(output / "model", ignore_errors=True)
    trainer.save_model(str(output / "model"))
    if trainer.is_world_process_zero():
        # What PEFT needs and nothing that changes from run to run.
        for path in (output / "model").iterdir():
            if path.name not in ("adapter_model.safetensors", "adapter_config.json"):
                path.unlink()
        # PEFT writes this list in the order of a set, which differs from process to process.
        config = read_json(output / "model" / "adapter_config.json")
        config["target_modules"] = sorted(config["target_modules"])
        write_json(output / "model" / "adapter_config.json", config)
        write_json(
            output / "finished.json",
            {
                "steps": trainer.state.global_step,
                "digest": tree_digest(output / "model"),
                "tokens_per_second": round(progress.speed, 1),
            },
        )


if __name__ == "__main__":
    run_main(main)
