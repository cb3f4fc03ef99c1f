"""One rank of the training. Launched by DeepSpeed; reads its job file and nothing else.

Rank 0 writes effective.json, selftest.json, the adapter, and last of all the success marker.
"""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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
from tasks.encode import IGNORED
from tasks.errors import StageError
from tasks.files import read_json, read_rows, tree_digest, write_json
from tasks.sft import SftParams, checkpoints, selftest
from tasks.sft.callbacks import Checkpoints, Progress
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


def finish(trainer: SFTTrainer, job: dict[str, Any], progress: Progress) -> None:
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
