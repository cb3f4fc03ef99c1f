"""Supervised fine-tuning: data/pack and data/base -> data/sft.

`python -m tasks.sft` compiles the plan, launches one process per rank (`tasks.sft.worker`), and accepts
the result only with its success marker: the `deepspeed` launcher can exit with 0 after a rank was
killed.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from nightshift.core.config import Count, StageParams, count_or_share

Steps = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Interval = Annotated[int | float, count_or_share("steps")]
Strategy = Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"]
Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32"]
Attention = Literal[
    "auto",
    "flash_attention_4",
    "flash_attention_3",
    "torch_varlen",
    "flash_attention_2",
    "xformers",
    "flex_attention",
    "avx512_per_example",
    "sdpa_per_example",
    "sdpa",
    "eager",
]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "schedule_free_adamw",
    "muon",
]
# Optimizers that users know from elsewhere -> why they are not supported, and what to set.
REFUSED = {
    "adamw_torch_4bit": "torchao is not among the pinned packages; set adamw_8bit, with twice the memory",
    "adamw_torch_8bit": "torchao is not among the pinned packages; set adamw_8bit, the same in bitsandbytes",
}
Schedule = Literal[
    "constant",
    "linear",
    "step",
    "exponential",
    "cosine",
    "cosine_with_restarts",
    "one_cycle",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
]
# Keyword arguments of each schedule.
SCHEDULE_KWARGS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": (),
    "step": ("step_size", "gamma"),
    "exponential": ("gamma",),
    "cosine": ("min_lr_rate",),
    "cosine_with_restarts": ("num_cycles", "min_lr_rate"),
    "one_cycle": ("pct_start", "div_factor", "final_div_factor"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "min_lr_rate"),
    "reduce_lr_on_plateau": ("factor", "patience", "threshold", "min_lr_rate"),
}
# The keyword argument without a default.
REQUIRED = {
    "step": "step_size",
    "exponential": "gamma",
    "cosine_with_restarts": "num_cycles",
    "warmup_stable_decay": "num_decay_steps",
}


class SchedulerKwargs(StageParams):
    """Keyword arguments of the learning rate schedule; `SCHEDULE_KWARGS` lists those of each schedule.

    Defaults are in parentheses.

    Attributes:
        step_size: step: optimizer steps between two decays.
        gamma: step, exponential: decay factor per `step_size` steps (0.1), or per step.
        num_cycles: cosine_with_restarts: number of cosine cycles.
        min_lr_rate: cosine, cosine_with_restarts, warmup_stable_decay, reduce_lr_on_plateau: minimum
            learning rate as a fraction of the peak, 0 to 1 (0).
        pct_start: one_cycle: fraction of the steps in which the learning rate increases (0.3).
        div_factor: one_cycle: peak over initial learning rate (25).
        final_div_factor: one_cycle: initial over final learning rate (10000).
        timescale: inverse_sqrt: steps from warmup to 1/sqrt(2) of the peak (the warmup steps, or 10000).
        num_decay_steps: warmup_stable_decay: optimizer steps of the final decay, from 2: the first one still
            has the full learning rate, as in transformers.
        factor: reduce_lr_on_plateau: factor of a reduction (0.1).
        patience: reduce_lr_on_plateau: evaluations without improvement tolerated before a reduction (1).
        threshold: reduce_lr_on_plateau: relative decrease that counts as improvement (0.0001).
    """

    step_size: Count | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    num_cycles: Count | None = None
    min_lr_rate: Share | None = None
    pct_start: Annotated[float, Field(gt=0, lt=1)] | None = None
    div_factor: Annotated[float, Field(gt=1)] | None = None
    final_div_factor: Annotated[float, Field(gt=1)] | None = None
    timescale: Count | None = None
    num_decay_steps: Annotated[int, Field(strict=True, ge=2)] | None = None
    factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    patience: Steps | None = None
    threshold: Share | None = None


def require_pattern(text: str) -> None:
    """Check that a text is a regular expression.

    Raises:
        ValueError: It is not.
    """
    try:
        re.compile(text)
    except re.error as err:
        raise ValueError(f"{text!r} is not a regular expression: {err}; correct it") from err


class SftParams(StageParams):
    """Hyperparameters, with the names and meaning of transformers, TRL and PEFT.

    Attributes:
        start_from: Weights that training starts from: those of the base, or of the champion if there is one.
        strategy: Distributed training strategy.
        num_processes: Number of ranks, or `auto`: one per visible GPU.
        hostfile: DeepSpeed hostfile for multi-node training, or None.
        offload_optimizer: Offload device of ZeRO's optimizer state.
        offload_param: Offload device of the ZeRO-3 or FSDP2 weights.
        nvme_path: Folder on a fast disk for `nvme`.
        per_device_train_batch_size: Micro-batch: packed rows per forward pass of one rank.
        gradient_accumulation_steps: Forward passes per optimizer step.
        num_train_epochs: Passes over the packed rows.
        max_steps: Maximum number of optimizer steps, or None.
        learning_rate: Peak learning rate.
        lr_scheduler_type: Learning rate schedule after warmup.
        lr_scheduler_kwargs: Keyword arguments of the schedule.
        warmup_steps: Optimizer steps of linear warmup from 0.
        warmup_ratio: Warmup as a fraction of all steps, 0 to below 1; this or warmup_steps is 0.
        optim: Optimizer.
        adam_beta1: Decay rate of Adam's first moment; Lion's too.
        adam_beta2: Decay rate of the second moment.
        adam_epsilon: Term added to the root of the second moment.
        weight_decay: Decoupled weight decay, not on biases and norms.
        max_grad_norm: Gradient clipping norm; 0 disables clipping.
        label_smoothing_factor: Probability mass spread over the vocabulary, 0 to 1.
        neftune_noise_alpha: NEFTune noise scale (arXiv 2310.05914), or None.
        precision: Precision of the forward and backward pass.
        attn_implementation: Attention implementation.
        activation_checkpointing: Recompute activations in the backward pass; `auto`: only if the
            training run does not fit in GPU memory otherwise.
        use_reentrant: PyTorch's older, reentrant activation checkpointing.
        use_liger_kernel: Liger's fused kernels; `auto`: on a GPU, if installed and supported.
        torch_compile: Compile the model.
        adapter: lora, qlora (4-bit base weights), or None for full fine-tuning.
        unfrozen_parameters: Regular expressions of the parameters that full fine-tuning trains, matched from
            the start of their names; empty for all.
        fp8_base: Multiply by the frozen base weights in float8.
        lora_r: LoRA rank.
        lora_alpha: LoRA scale times rank.
        lora_dropout: Dropout on the adapter input, 0 to 1.
        lora_target_modules: `all-linear`, module names, or a regular expression of whole module names.
        lora_layers_to_transform: Numbers, from 0, of the layers that get an adapter, or None for all.
        lora_target_parameters: Ends of the names of parameters that get an adapter, such as the weights of
            experts, which are no modules.
        lora_modules_to_save: Names of modules that are trained and saved whole, next to the adapter.
        use_dora: Weight-decomposed LoRA (arXiv 2402.09353).
        use_rslora: Scale by the root of the rank (arXiv 2312.03732).
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv 2402.12354), or None.
        eval_steps: Optimizer steps between evaluations on the validation set, as a number or as a share
            of all steps, or None.
        per_device_eval_batch_size: Examples, or packed rows, per forward pass of an evaluation.
        eval_packing: Evaluate on packed rows; the loss is the same.
        early_stopping_patience: Evaluations without improvement before early stopping, or None.
        early_stopping_min_delta: Decrease of the loss, in nats per token, that counts as improvement.
        load_best_model_at_end: Keep the weights with the lowest evaluation loss, not the last ones.
        save_steps: Optimizer steps between checkpoints, as a number or as a share of all steps.
        save_total_limit: Number of newest checkpoints to keep; the best one is always kept.
        logging_steps: Optimizer steps between logged metrics.
        max_loss_ratio: Ratio of the loss to the median of the last 20 that makes a spike, or None.
        loss_watchdog_threshold: Loss above which a logged step counts as diverged, or None.
        loss_watchdog_patience: Diverged steps in a row after which training stops.
        step_timeout_seconds: Maximum duration of one step, after which the training run counts as hung.
        seed: Seed of row order, dropout, noise and new weights.
    """

    start_from: Literal["base", "champion"]
    strategy: Strategy
    num_processes: Count | Literal["auto"]
    hostfile: str | None
    offload_optimizer: Literal["none", "cpu", "nvme"]
    offload_param: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    num_train_epochs: Count
    max_steps: Count | None
    learning_rate: Positive
    lr_scheduler_type: Schedule
    lr_scheduler_kwargs: SchedulerKwargs
    warmup_steps: Steps
    warmup_ratio: Share
    optim: Optimizer
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: Positive
    weight_decay: Share
    max_grad_norm: Annotated[float, Field(ge=0)]
    label_smoothing_factor: Share
    neftune_noise_alpha: Positive | None
    precision: Precision
    attn_implementation: Attention
    activation_checkpointing: bool | Literal["auto"]
    use_reentrant: bool
    use_liger_kernel: bool | Literal["auto"]
    torch_compile: bool
    adapter: Literal["lora", "qlora"] | None
    unfrozen_parameters: list[str]
    fp8_base: bool
    lora_r: Count
    lora_alpha: Count
    lora_dropout: Share
    lora_target_modules: str | list[str]
    lora_layers_to_transform: Annotated[list[Steps], Field(min_length=1)] | None
    lora_target_parameters: list[str]
    lora_modules_to_save: list[str]
    use_dora: bool
    use_rslora: bool
    loraplus_lr_ratio: Positive | None
    eval_steps: Interval | None
    per_device_eval_batch_size: Count
    eval_packing: bool
    early_stopping_patience: Count | None
    early_stopping_min_delta: Annotated[float, Field(ge=0)]
    load_best_model_at_end: bool
    save_steps: Interval
    save_total_limit: Count
    logging_steps: Count
    max_loss_ratio: Annotated[float, Field(gt=1)] | None
    loss_watchdog_threshold: Positive | None
    loss_watchdog_patience: Count
    step_timeout_seconds: Count
    seed: Steps

    @property
    def ranks(self) -> int:
        """Return the number of processes, once `tasks.sft.backend.with_processes` has resolved it."""
        assert self.num_processes != "auto"
        return self.num_processes

    @field_validator("optim", mode="before")
    @classmethod
    def _optimizer_is_supported(cls, value: object) -> object:
        if why := REFUSED.get(str(value)):
            raise ValueError(f"{value} is not supported: {why}")
        return value

    @field_validator("lora_target_modules")
    @classmethod
    def _pattern_compiles(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            require_pattern(value)
        return value

    @field_validator("unfrozen_parameters")
    @classmethod
    def _patterns_compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            require_pattern(pattern)
        return value

    @model_validator(mode="after")
    def _values_fit_together(self) -> "SftParams":
        from tasks.sft.conflicts import find_conflicts

        if found := list(find_conflicts(self)):
            raise ValueError("\n  sft: ".join(found))
        return self
