"""Tune as one rank. Launched like the ranks of `tasks.sft`; reads only its job file."""

from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, KTOConfig

from nightshift.core.stage import run_main
from tasks.prefer.job import PreferJob, read_job
from tasks.prefer.proof import Proof
from tasks.prefer.rows import ANSWERS, NO_ROW, other_rows
from tasks.prefer.trainer import AnswerTuner, PairTuner, Tuner
from tasks.sft.guard import Guard
from tasks.sft.model import load_model
from tasks.sft.rows import map_rows, planned_rows
from tasks.sft.worker import common_arguments, declare, run_rank


def main(job_file: Path) -> None:
    """Tune a job; on failure, write the reason."""
    run_rank(read_job(job_file), build_trainer, Proof)


def build_trainer(job: PreferJob, callbacks: list[TrainerCallback]) -> Tuner:
    """Build the trainer on the rows in the order of the plan, with the model of `sft`."""
    method = str(job.prefer.method)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    args = training_arguments(job)
    token = [tokenizer.eos_token_id]
    filler: dict[str, Any] = {"row": NO_ROW, "prompt_ids": token, **dict.fromkeys(ANSWERS[method], token)}
    if method == "kto":
        filler["label"] = True
    guards = [one.watch for one in callbacks if isinstance(one, Guard)]
    return {"dpo": PairTuner, "kto": AnswerTuner}[method](
        job=job,
        filler=filler,
        watch=guards[0] if guards else lambda: None,
        rows=map_rows(job.rows),
        model=load_policy(job),
        args=args,
        train_dataset=train_rows(job, filler),
        eval_dataset=map_rows(job.eval_rows) if job.eval_rows else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def train_rows(job: PreferJob, filler: dict[str, Any]) -> Any:
    """Return the rows in the order of the plan; for KTO, only their numbers (see `AnswerTuner`)."""
    from datasets import Dataset

    order = job.plan.order
    if job.prefer.method == "dpo":
        return planned_rows(job.rows, order, filler)
    # The plan's forward passes, also when a smaller micro-batch halves them.
    others = other_rows(order, job.prefer.per_device_train_batch_size)
    return Dataset.from_dict({"position": list(range(len(order))), "row": order, "other_row": others})


def load_policy(job: PreferJob) -> Any:
    """Load the model of `sft` as `sft` loads it to train: its adapter, or its whole weights."""
    params, backend = job.params, job.backend
    settings = (params, backend.strategy, backend.precision, backend.attention, backend.unreached)
    if params.adapter is None:
        return load_model(str(job.model), *settings)
    model = load_model(str(job.base), *settings)
    set_peft_model_state_dict(model, load_file(job.model / "adapter_model.safetensors"))
    return model


def training_arguments(job: PreferJob) -> DPOConfig | KTOConfig:
    """Convert the parameters to TRL's, and disable everything that TRL would do silently."""
    prefer = job.prefer
    common = {
        **common_arguments(job),
        "beta": prefer.beta,
        # The rows are no longer than that.
        "max_length": None,
        "precompute_ref_log_probs": True,
        "disable_dropout": True,
    }
    if prefer.method == "dpo":
        return DPOConfig(**common, loss_type=[prefer.loss_type])
    weights = {"desirable_weight": prefer.desirable_weight, "undesirable_weight": prefer.undesirable_weight}
    return KTOConfig(**common, loss_type="kto", **weights)


if __name__ == "__main__":
    run_main(main, declare)
