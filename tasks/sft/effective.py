"""What runs, next to what was requested: data/sft/effective.json covers every parameter of the section."""

import os
import re
from collections import Counter
from dataclasses import asdict
from typing import Any

from nightshift.core.errors import StageError
from tasks.sft import SftParams
from tasks.sft.fused import count_lora
from tasks.sft.job import Job
from tasks.sft.layers import find_fused
from tasks.sft.machine import VISIBLE
from tasks.sft.trainer import Trainer

# Parameters that transformers applies; their effective values are those of its arguments.
FROM_ARGUMENTS = (
    *("per_device_eval_batch_size", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("weight_decay", "max_grad_norm", "torch_compile", "save_steps", "logging_steps", "seed"),
)
# What PEFT appends to the name of a module.
ADAPTER_PART = re.compile(r"\.(?:lora_|base_layer|modules_to_save)")


def effective(trainer: Trainer, job: Job) -> dict[str, Any]:
    """Return requested values next to effective ones.

    Raises:
        StageError: They differ, and the requested value is not `auto`.
    """
    args = trainer.args
    backend, strategy = job.backend, running_strategy(trainer)
    devices = os.environ[VISIBLE].split(",") if backend.device == "cuda" else []
    if strategy != backend.strategy:
        raise StageError(
            f"strategy {backend.strategy} was chosen, but {strategy} is active; this is a bug, report it"
        )
    runs = {
        "start_from": "base" if job.start.version is None else "champion",
        "strategy": strategy,
        "precision": backend.precision,
        "attn_implementation": trainer.model.config._attn_implementation,
        "num_processes": args.world_size,
        # The trainer builds Muon, which transformers does not know.
        "optim": "muon" if trainer.params.optim == "muon" else args.optim.value,
        # The self-test compares both with the model, since they are enabled when training starts.
        "activation_checkpointing": args.activation_checkpointing,
        "fp8_base": trainer.params.fp8_base,
        "use_liger_kernel": args.use_liger_kernel,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **{key: getattr(args, key) for key in FROM_ARGUMENTS},
    }
    # What transformers does not know, such as the schedule, this code computes from the job's parameters.
    values = {**job.params.model_dump(), **runs, **unused(job.params)}
    table = {
        key: {"requested": value, "effective": values[key]}
        for key, value in job.requested.model_dump().items()
    }
    # A later attempt may use a smaller micro-batch; the rows per step stay the same. The strategy is
    # compared above. Without a champion that fits, training starts from the base.
    free = {"per_device_train_batch_size", "gradient_accumulation_steps", "strategy", "start_from"}
    # Shares of all steps are steps now.
    free |= {"eval_steps", "save_steps", *unused(job.params)}
    different = {
        key: row
        for key, row in table.items()
        if row["requested"] not in ("auto", row["effective"]) and key not in free
    }
    if different:
        raise StageError(f"requested and effective values differ: {different}; this is a bug, report it")
    return {
        **table,
        "batches": {"requested": "auto", "effective": backend.batches},
        "trained": count_trained(trainer.model),
        "device": {"requested": "auto", "effective": backend.device},
        "devices": {"requested": job.visible, "effective": devices},
        "loss": {"requested": "auto", "effective": "chunked" if trainer.head else "logits"},
        "lora": {"requested": "auto", "effective": count_lora(trainer.model)},
        "fused_layers": {"requested": "auto", "effective": len(find_fused(trainer.model))},
        "start": asdict(job.start),
        "strategy_reason": backend.reason,
    }


def unused(params: SftParams) -> dict[str, None]:
    """Return the parameters that have no effect, as None, because of what others choose."""
    names: list[str] = []
    matrices_only = params.adapter and not params.use_dora and not params.lora_modules_to_save
    if params.optim == "adafactor" or (params.optim == "muon" and matrices_only):
        names += ["adam_beta1", "adam_beta2", "adam_epsilon"]
    if params.adapter is None:
        names += [name for name in SftParams.model_fields if name.startswith("lora_")]
    else:
        names += ["unfrozen_parameters"]
    return dict.fromkeys(names)


def count_trained(model: Any) -> dict[str, Any]:
    """Count what trains: the weights, and the modules of each name that have any."""
    names = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    owners = {ADAPTER_PART.split(name)[0].removesuffix(".weight").removesuffix(".bias") for name in names}
    modules = Counter(owner.rpartition(".")[2] for owner in owners)
    # ZeRO-3 keeps the size of a sharded weight in its own attribute.
    sizes = (getattr(weight, "ds_numel", weight.numel()) for weight in names.values())
    return {"weights": sum(sizes), "tensors": len(names), "modules": dict(sorted(modules.items()))}


def running_strategy(trainer: Trainer) -> str:
    """Return the distributed strategy that the accelerator runs."""
    accelerator = trainer.accelerator
    if plugin := accelerator.state.deepspeed_plugin:
        return f"zero{plugin.zero_stage}"
    if accelerator.is_fsdp2:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"
