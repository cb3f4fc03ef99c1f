"""Values of the `sft` section that are valid alone but not together, each with the fix."""

import math
from collections.abc import Iterator

from tasks.sft import REQUIRED, SCHEDULE_KWARGS, SftParams

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit")
# Optimizers of whole weights, which no strategy may shard.
WHOLE = ("schedule_free_adamw", "muon")
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit")


def find_conflicts(params: SftParams) -> Iterator[str]:
    """Yield conflicts that exist on any machine."""
    yield from _schedule(params)
    yield from _strategy(params)
    yield from _adapter(params)
    yield from _evaluation(params)
    if params.use_reentrant and params.activation_checkpointing is not True:
        yield "use_reentrant=true needs activation_checkpointing=true; set it, or use_reentrant to false"
    if params.use_reentrant and (params.adapter or params.unfrozen_parameters):
        yield "use_reentrant=true gives no gradients when the embeddings are frozen; set it to false"
    if params.torch_compile and params.use_liger_kernel is True:
        yield "torch_compile and use_liger_kernel both replace the same operators; set one of them to false"


def _schedule(params: SftParams) -> Iterator[str]:
    kind = params.lr_scheduler_type
    given = params.lr_scheduler_kwargs.model_dump(exclude_none=True)
    takes = SCHEDULE_KWARGS[kind]
    if unknown := sorted(given.keys() - set(takes)):
        yield (
            f"lr_scheduler_kwargs: {kind} does not take {', '.join(unknown)}; it takes "
            f"{', '.join(takes) or 'nothing'}"
        )
    if (needed := REQUIRED.get(kind)) and needed not in given:
        yield f"lr_scheduler_kwargs: {kind} needs {needed}; add it"
    if params.warmup_steps and params.warmup_ratio:
        yield (
            f"warmup_steps={params.warmup_steps} and warmup_ratio={params.warmup_ratio} are mutually "
            "exclusive; set one to 0"
        )
    if kind == "one_cycle" and (params.warmup_steps or params.warmup_ratio):
        yield "one_cycle has its own warmup (pct_start); set warmup_steps and warmup_ratio to 0"
    if params.max_steps is not None and params.warmup_steps >= params.max_steps:
        yield f"warmup_steps={params.warmup_steps} must be below max_steps={params.max_steps}; lower it"
    if params.optim == "schedule_free_adamw" and kind != "constant":
        yield f"schedule_free_adamw needs lr_scheduler_type constant, got {kind}"
    if params.optim in WHOLE and params.strategy not in ("single", "ddp"):
        yield f"optim {params.optim} needs strategy single or ddp, got {params.strategy}"
    if kind == "reduce_lr_on_plateau" and params.eval_steps is None:
        yield "reduce_lr_on_plateau depends on the evaluation loss; set eval_steps"


def _strategy(params: SftParams) -> Iterator[str]:
    kind, optimizer, weights = params.strategy, params.offload_optimizer, params.offload_param
    if kind == "single" and params.num_processes not in ("auto", 1):
        yield f"strategy single is one process; set num_processes={params.num_processes} to auto, or use ddp"
    if optimizer == "cpu" and kind not in ("zero1", "zero2", "zero3"):
        yield f"offload_optimizer cpu needs strategy zero1, zero2 or zero3, got {kind}"
    if optimizer == "nvme" and kind != "zero3":
        yield f"offload_optimizer nvme needs strategy zero3, got {kind}"
    if weights == "cpu" and kind not in ("zero3", "fsdp2"):
        yield f"offload_param cpu needs strategy zero3 or fsdp2, got {kind}"
    if weights == "nvme" and kind != "zero3":
        yield f"offload_param nvme needs strategy zero3, got {kind}"
    if "nvme" in (optimizer, weights) and params.nvme_path is None:
        yield "offloading to nvme needs nvme_path: a folder on a fast disk"
    if optimizer != "none" and params.optim not in ("adamw_torch", "adamw_torch_fused"):
        yield (
            "offload_optimizer runs DeepSpeed's Adam on the CPU; set optim to adamw_torch, "
            f"got {params.optim}"
        )
    if kind == "fsdp2" and params.optim in (*EIGHT_BIT, *PAGED, "adafactor"):
        yield f"optim {params.optim} cannot shard its state for fsdp2; use adamw_torch"
    if params.hostfile is not None and kind == "single":
        yield "hostfile lists machines, but strategy single is one process; set hostfile to null"


def _adapter(params: SftParams) -> Iterator[str]:
    yield from _kind(params)
    if params.adapter == "qlora" and params.strategy == "zero3":
        yield "qlora's 4-bit weights cannot be sharded by zero3; use zero2, fsdp2 or ddp"
    if params.adapter == "qlora" and params.offload_param != "none":
        yield "qlora's 4-bit weights cannot be offloaded; set offload_param to none"
    if params.fp8_base:
        yield from _float8(params)
    if not params.lora_target_modules:
        yield "lora_target_modules is empty; list modules, or set all-linear"
    if params.lora_target_parameters:
        yield from _parameters(params)
    if params.lora_modules_to_save:
        yield from _whole_modules(params)
    if params.loraplus_lr_ratio is not None and params.optim == "muon":
        yield "optim muon has one learning rate for A and B; set loraplus_lr_ratio to null"
    if params.loraplus_lr_ratio is not None and params.offload_optimizer != "none":
        yield "loraplus_lr_ratio needs the optimizer on the device; set offload_optimizer to none"


def _kind(params: SftParams) -> Iterator[str]:
    """Yield options of an adapter without one, and of full fine-tuning with one."""
    if params.adapter is None:
        options = {
            "use_dora": params.use_dora,
            "use_rslora": params.use_rslora,
            "loraplus_lr_ratio": params.loraplus_lr_ratio is not None,
            "lora_target_parameters": bool(params.lora_target_parameters),
            "lora_modules_to_save": bool(params.lora_modules_to_save),
            "lora_layers_to_transform": params.lora_layers_to_transform is not None,
        }
        for name in [name for name, is_set in options.items() if is_set]:
            yield f"{name} needs an adapter; set adapter to lora, or unset {name}"
    elif params.unfrozen_parameters:
        yield (
            f"unfrozen_parameters is for full fine-tuning, and adapter is {params.adapter}; set it to [], or "
            "adapter to null (modules beside an adapter: lora_modules_to_save)"
        )


def _parameters(params: SftParams) -> Iterator[str]:
    """Yield conflicts with adapters of single parameters, which PEFT adds to the weights in each pass."""
    fits = {
        f"lora_dropout {params.lora_dropout}": not params.lora_dropout,
        "use_dora": not params.use_dora,
        "lora_layers_to_transform": params.lora_layers_to_transform is None,
        f"strategy {params.strategy}": params.strategy not in ("zero3", "fsdp2"),
    }
    for what in [what for what, is_fit in fits.items() if not is_fit]:
        yield f"lora_target_parameters is incompatible with {what}; set it to [], or change the other"


def _whole_modules(params: SftParams) -> Iterator[str]:
    """Yield conflicts with modules that are trained whole."""
    kind = params.strategy
    if kind in ("zero3", "fsdp2"):
        yield (
            f"lora_modules_to_save needs whole modules on each device, and {kind} shards them; use zero2, or "
            "set it to []"
        )
    if params.loraplus_lr_ratio is not None:
        yield "loraplus_lr_ratio sets rates for the adapter only; set lora_modules_to_save to [], or unset it"
    targets = params.lora_target_modules
    if isinstance(targets, list) and (both := sorted(set(targets) & set(params.lora_modules_to_save))):
        yield f"lora_modules_to_save and lora_target_modules both name {', '.join(both)}; remove it from one"


def _float8(params: SftParams) -> Iterator[str]:
    """Yield conflicts with float8, which only the fused function of a plain LoRA layer supports."""
    fits = {
        f"adapter {params.adapter}": params.adapter == "lora",
        f"strategy {params.strategy}": params.strategy not in ("zero3", "fsdp2"),
        f"precision {params.precision}": params.precision in ("auto", "bf16"),
        f"lora_dropout {params.lora_dropout}": not params.lora_dropout,
        "use_dora": not params.use_dora,
        "torch_compile": not params.torch_compile,
    }
    for what in [what for what, is_fit in fits.items() if not is_fit]:
        yield f"fp8_base is incompatible with {what}; set fp8_base to false, or train plain LoRA in bf16"


def _evaluation(params: SftParams) -> Iterator[str]:
    needs = {
        "early_stopping_patience": params.early_stopping_patience is not None,
        "load_best_model_at_end": params.load_best_model_at_end,
    }
    if params.eval_steps is None:
        for name in [name for name, is_set in needs.items() if is_set]:
            yield f"{name} depends on the evaluation loss; set eval_steps"
    elif params.load_best_model_at_end and params.optim == "schedule_free_adamw":
        yield (
            "optim schedule_free_adamw trains and saves other weights than it evaluates; set "
            "load_best_model_at_end to false"
        )
    elif params.load_best_model_at_end and not saves_each_evaluation(params):
        yield (
            f"load_best_model_at_end needs a checkpoint at each evaluation: eval_steps={params.eval_steps} "
            f"must be a multiple of save_steps={params.save_steps}, both as numbers or both as shares"
        )


def saves_each_evaluation(params: SftParams) -> bool:
    """Return whether there is a checkpoint at each evaluation; shares are compared up to rounding."""
    evaluation, saving = params.eval_steps, params.save_steps
    if evaluation is None or isinstance(evaluation, float) != isinstance(saving, float):
        return False
    ratio = evaluation / saving
    return ratio >= 1 - 1e-9 and math.isclose(ratio, round(ratio), rel_tol=1e-9)
