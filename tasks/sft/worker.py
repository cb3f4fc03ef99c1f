"""Train as one rank. Launched by DeepSpeed; reads only its job file.

Rank 0 writes effective.json, selftest.json, the adapter and, last, the success marker.
"""

import argparse
import gc
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig

from nightshift.core.errors import PipelineError, StageError, TrainingError
from nightshift.core.files import read_json, text_digest, tree_digest, write_json
from nightshift.core.paths import START_MODEL
from nightshift.core.stage import run_main
from nightshift.data.encode import IGNORED
from nightshift.pipeline import supervise
from tasks.sft import SftParams, checkpoints
from tasks.sft.callbacks import Progress
from tasks.sft.effective import effective
from tasks.sft.failures import is_out_of_memory, write_failure, write_unknown
from tasks.sft.fused import fuse_adapter
from tasks.sft.guard import Guard
from tasks.sft.history import best_step, is_exhausted
from tasks.sft.job import Job, read_job
from tasks.sft.layers import fuse_layers
from tasks.sft.model import load_adapter, load_model
from tasks.sft.planned import Planned, writing
from tasks.sft.proof import Proof
from tasks.sft.rows import map_rows, planned_rows
from tasks.sft.strategy import deepspeed_config, fsdp_config
from tasks.sft.trainer import Trainer

# Files needed to load the weights, in addition to the safetensors.
WEIGHT_FILES = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
log = logging.getLogger(__name__)
AnyJob = TypeVar("AnyJob", bound=Job)
Build = Callable[[AnyJob, list[TrainerCallback]], Any]
Prove = Callable[[AnyJob], Any]


def main(job_file: Path) -> None:
    """Train a job; on failure, write the reason."""
    run_rank(read_job(job_file), build_trainer, Proof)


def run_rank(job: AnyJob, build: Build[AnyJob], proof: Prove[AnyJob]) -> None:
    """Train a job with its trainer and its proofs; on failure, write the reason.

    Args:
        job: Job.
        build: Builds the trainer of a job with callbacks.
        proof: Builds the callback that tests the trainer, which it is given as `trainer`, before step 1.
    """
    # A rank without its launcher would wait for the other ranks forever.
    supervise.die_with_parent()
    # Imported objects are permanent; exclude them from garbage collection, also at exit.
    gc.freeze()
    folder = job.folder
    try:
        train(job, build, proof)
    except TrainingError as err:
        write_failure(folder, err.kind, str(err), err.steps)
        raise
    except PipelineError as err:
        write_failure(folder, "error", str(err))
        raise
    except Exception as err:
        if not is_out_of_memory(err):
            write_unknown(folder, os.environ.get("RANK", "0"), err)
            raise
        text = str(err).partition("\n")[0]
        write_failure(folder, "out_of_memory", f"out of memory: {text}")
        raise StageError(f"out of memory: {text}") from err


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the command-line arguments."""
    parser.add_argument("job_file", type=Path, help="job written by tasks.sft")


def train(job: AnyJob, build: Build[AnyJob], prove: Prove[AnyJob]) -> None:
    """Build the trainer, run the self-test, train from the newest checkpoint, save; see `run_rank`."""
    params, folder = job.params, job.folder
    # Set the seed before the adapter weights are initialized.
    set_seed(params.seed)
    progress = Progress(job)
    guard, proof = Guard(job), prove(job)
    trainer = build(job, [guard, proof, progress])
    trainer.remove_callback(PrinterCallback)
    require_one_job(job)
    proof.trainer = trainer
    resume = checkpoints.find_newest(folder)
    trainer.saved = checkpoints.step(resume) if resume else 0
    if resume and is_stopped(resume, params):
        # Early stopping has already ended this run: only its weights are needed.
        trainer.args.max_steps = checkpoints.step(resume)
    if trainer.is_world_process_zero():
        write_json(folder / "output" / "effective.json", effective(trainer, job))
        log.info("%s", f"resuming from {resume.name}" if resume else "starting at step 1")
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finish(trainer, job, progress, guard)
    finally:
        progress.close()


def require_one_job(job: Job) -> None:
    """Compare the jobs of all ranks; each machine may have written its own.

    Raises:
        StageError: The jobs differ.
    """
    shared = job.model_dump(mode="json", exclude={"spool", "tracking_uri", "visible"})
    del shared["backend"]["devices"]
    digests = gather_object([text_digest(json.dumps(shared, sort_keys=True))])
    if len(set(digests)) > 1:
        raise StageError(
            f"the ranks have different jobs (digests by rank: {[digest[:8] for digest in digests]}); use the "
            "same code, parameters, data and state folder on all machines, and start all of them again"
        )


def is_stopped(checkpoint: Path, params: SftParams) -> bool:
    """Return whether early stopping ended the training run at a checkpoint."""
    history = read_json(checkpoint / "trainer_state.json")["log_history"]
    return is_exhausted(history, params.early_stopping_patience, params.early_stopping_min_delta)


def build_trainer(job: Job, callbacks: list[TrainerCallback]) -> Trainer:
    """Build the trainer on the packed rows, in the order of the plan."""
    params, backend = job.params, job.backend
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    # Before the model: ZeRO-3 shards the weights while they load if the DeepSpeed config is already set.
    args = training_arguments(job)
    filler = {"input_ids": [tokenizer.eos_token_id] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}
    is_further = job.start.version is not None
    weights = START_MODEL if is_further and params.adapter is None else job.base
    model = load_model(
        str(weights), params, backend.strategy, backend.precision, backend.attention, backend.unreached
    )
    if is_further and params.adapter:
        load_adapter(model, START_MODEL)
    if backend.lora == "fused":
        fuse_adapter(model)
        if backend.attention == "avx512_per_example":
            fuse_layers(model)
    if params.fp8_base:
        from tasks.sft.float8 import QuantizeBase

        callbacks = [QuantizeBase(), *callbacks]
    return Trainer(
        params=params,
        plan=job.plan,
        filler=filler,
        loss=backend.loss,
        model=model,
        args=args,
        train_dataset=planned_rows(job.rows, job.plan.order, filler),
        eval_dataset=map_rows(job.eval_rows) if job.eval_rows else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def training_arguments(job: Job) -> SFTConfig:
    """Convert the parameters to TRL's, and disable everything that TRL would do silently."""
    return SFTConfig(
        **common_arguments(job),
        # The rows are already packed.
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=job.backend.batches == "flattened",
        packing=False,
        eval_packing=False,
        max_length=None,
    )


def common_arguments(job: Job) -> dict[str, Any]:
    """Convert the parameters that all trainers have to those of transformers."""
    params, backend = job.params, job.backend
    precision = backend.precision
    fsdp = fsdp_config(params, backend.strategy)
    return {
        "output_dir": str(job.folder),
        "max_steps": job.plan.steps,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation_steps,
        "per_device_eval_batch_size": params.per_device_eval_batch_size,
        "learning_rate": params.learning_rate,
        # The learning rates come from the plan.
        "lr_scheduler_type": "constant",
        # The trainer builds Muon, which transformers does not know.
        "optim": "adamw_torch" if params.optim == "muon" else params.optim,
        "adam_beta1": params.adam_beta1,
        "adam_beta2": params.adam_beta2,
        "adam_epsilon": params.adam_epsilon,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "tf32": True if precision == "tf32" else None,
        "use_cpu": backend.device == "cpu",
        "deepspeed": deepspeed_config(
            params, backend.strategy, precision, job.micro_batch_size, backend.device
        ),
        "fsdp": fsdp is not None,
        "fsdp_config": fsdp,
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": params.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": params.use_reentrant},
        "use_liger_kernel": params.use_liger_kernel,
        "torch_compile": params.torch_compile,
        # The plan shuffles the rows.
        "train_sampling_strategy": "sequential",
        "eval_strategy": "steps" if params.eval_steps else "no",
        "eval_steps": params.eval_steps,
        "save_strategy": "steps",
        "save_steps": params.save_steps,
        "logging_steps": params.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": params.seed,
        "data_seed": params.seed,
    }


def finish(trainer: Planned, job: Job, progress: Progress, guard: Guard) -> None:
    """Save the weights and, last, the success marker.

    Raises:
        StageError: Training ended before the last planned step, or a weight is not finite.
        TrainingError: Training was preempted by SIGTERM.
    """
    params, step = trainer.params, trainer.state.global_step
    cpu_shares = gather_object([progress.cpu_share()])
    progress.log_cpu_shares(cpu_shares, step)
    history = trainer.state.log_history
    stopped = is_exhausted(history, params.early_stopping_patience, params.early_stopping_min_delta)
    if step != job.plan.steps and not stopped:
        if guard.is_preempted:
            raise TrainingError("preempted", f"received SIGTERM; saved at step {step}")
        raise StageError(f"training ended at step {step} of {job.plan.steps}; run again")
    if hasattr(trainer.optimizer, "eval"):
        # A schedule-free optimizer uses different weights for training and for inference.
        trainer.optimizer.eval()
    output = job.folder / "output"
    if trainer.is_world_process_zero():
        shutil.rmtree(output / "model", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    best = best_step(history) if params.load_best_model_at_end else None
    if best is None:
        with writing("the trained model"):
            trainer.save_model(str(output / "model"))
    elif trainer.is_world_process_zero():
        copy_weights(job.folder / f"checkpoint-{best}", output / "model")
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        remove_extra_files(output / "model")
        checkpoints.require_finite(output / "model")
        write_json(
            output / "finished.json",
            {
                "steps": step,
                "best_step": best,
                "digest": tree_digest(output / "model"),
                "tokens_per_second": round(progress.speed, 1),
                "cpu_shares": cpu_shares,
            },
        )


def copy_weights(checkpoint: Path, target: Path) -> None:
    """Copy the weights of a checkpoint, and the files needed to load them."""
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors" or path.name in WEIGHT_FILES:
            shutil.copyfile(path, target / path.name)


def remove_extra_files(model: Path) -> None:
    """Keep only what is needed to load the weights, and nothing that changes between runs."""
    for path in model.iterdir():
        if path.suffix != ".safetensors" and path.name not in WEIGHT_FILES:
            path.unlink()
    config = model / "adapter_config.json"
    if config.is_file():
        # PEFT writes this list in set order, which differs between processes.
        values = read_json(config)
        if isinstance(values["target_modules"], list):
            values["target_modules"] = sorted(values["target_modules"])
        write_json(config, values)


if __name__ == "__main__":
    run_main(main, declare)
