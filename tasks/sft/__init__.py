"""Supervised fine-tuning: data/pack and data/base -> data/sft.

`python -m tasks.sft` compiles the plan, launches one process for each rank (`tasks.sft.worker`), and accepts
the result only with its success marker: the `deepspeed` launcher can exit with 0 although a rank was killed.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nightshift.core.config import Count, StageParams

Steps = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
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
    "sdpa_per_example",
    "sdpa",
    "eager",
]
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
# Numbers that each schedule takes.
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
# Of these, the one without a usual value.
REQUIRED = {
    "step": "step_size",
    "exponential": "gamma",
    "cosine_with_restarts": "num_cycles",
    "warmup_stable_decay": "num_decay_steps",
}


class SchedulerKwargs(StageParams):
    """Numbers of a schedule; each schedule takes some of them (`SCHEDULE_KWARGS`).

    Attributes:
        step_size: step: optimiser steps between two drops.
        gamma: step, exponential: factor of a drop (0.1), or of each step.
        num_cycles: cosine_with_restarts: times that the cosine runs.
        min_lr_rate: cosine, cosine_with_restarts, warmup_stable_decay, reduce_lr_on_plateau: lowest share of
            the peak, 0 to 1 (0).
        pct_start: one_cycle: share of the steps in which the rate rises (0.3).
        div_factor: one_cycle: peak divided by the first rate (25).
        final_div_factor: one_cycle: first rate divided by the last (10000).
        timescale: inverse_sqrt: steps after the warm-up that halve the rate's square (the warm-up, or 10000).
        num_decay_steps: warmup_stable_decay: optimiser steps of the decay at the end.
        factor: reduce_lr_on_plateau: factor of a reduction (0.1).
        patience: reduce_lr_on_plateau: evaluations without improvement before a reduction (1).
        threshold: reduce_lr_on_plateau: relative improvement of the loss that counts (0.0001).
    """

    step_size: Count | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    num_cycles: Count | None = None
    min_lr_rate: Share | None = None
    pct_start: Annotated[float, Field(gt=0, lt=1)] | None = None
    div_factor: Annotated[float, Field(gt=1)] | None = None
    final_div_factor: Annotated[float, Field(gt=1)] | None = None
    timescale: Count | None = None
    num_decay_steps: Count | None = None
    factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    patience: Steps | None = None
    threshold: Share | None = None


class SftParams(StageParams):
    """Hyper-parameters; names and meaning are those of transformers, TRL and PEFT.

    Attributes:
        strategy: How the ranks share the work.
        num_processes: Ranks, or `auto`: one for each visible GPU.
        hostfile: DeepSpeed's list of hosts for several machines, or None.
        offload_optimizer: Where ZeRO keeps the optimiser's state.
        offload_param: Where ZeRO-3 or FSDP2 keeps the weights.
        nvme_path: Folder on a fast disk for `nvme`.
        per_device_train_batch_size: Packed rows in one forward pass of one rank.
        gradient_accumulation_steps: Forward passes before an optimiser step.
        num_train_epochs: Passes over the packed rows.
        max_steps: Optimiser steps at most, or None.
        learning_rate: Peak learning rate.
        lr_scheduler_type: Shape of the learning rate after the warm-up.
        lr_scheduler_kwargs: Numbers of that shape.
        warmup_steps: Optimiser steps in which the rate rises from 0.
        warmup_ratio: The same as a share of all steps, 0 to below 1; one of the two is 0.
        optim: Optimiser.
        adam_beta1: Decay of Adam's first moment; Lion's too.
        adam_beta2: Decay of its second moment.
        adam_epsilon: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, not on biases and norms.
        max_grad_norm: Clipping norm; 0 is off.
        label_smoothing_factor: Probability mass given to all other tokens, 0 to 1.
        neftune_noise_alpha: Strength of the noise on the embeddings (arXiv 2310.05914), or None.
        precision: Arithmetic of the forward and backward pass.
        attn_implementation: Attention kernel.
        activation_checkpointing: Recompute activations in the backward pass instead of keeping them; `auto`:
            if the training does not fit into a GPU's memory otherwise.
        use_reentrant: PyTorch's older way of doing so.
        use_liger_kernel: Liger's fused kernels; `auto`: on a GPU where they are installed and know the model.
        torch_compile: Compile the model.
        adapter: lora, qlora (4-bit base), or None for a full fine-tune.
        fp8_base: Multiply with the base's frozen weights in float8.
        lora_r: LoRA rank.
        lora_alpha: LoRA scale times rank.
        lora_dropout: Dropout before the adapter, 0 to 1.
        lora_target_modules: `all-linear`, or names of modules.
        use_dora: Weight-decomposed LoRA (arXiv 2402.09353).
        use_rslora: Scale by the root of the rank (arXiv 2312.03732).
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv 2402.12354), or None.
        eval_steps: Optimiser steps between evaluations on the validation side, or None.
        per_device_eval_batch_size: Examples, or rows, in one forward pass of an evaluation.
        eval_packing: Evaluate on packed rows; the loss is the same.
        early_stopping_patience: Evaluations without improvement before the training stops, or None.
        early_stopping_min_delta: Fall of the loss, in nats per token, that counts as improvement.
        load_best_model_at_end: Keep the weights of the lowest evaluation loss instead of the last.
        save_steps: Optimiser steps between checkpoints.
        save_total_limit: Checkpoints that are kept; the best one is kept beside them.
        logging_steps: Optimiser steps between metrics.
        max_loss_ratio: Loss over the median of the last 20, above which a step counts as a spike, or None.
        step_timeout_seconds: Longest time of one step, after which the training counts as hung.
        seed: Seed of row order, dropout, noise and new weights.
    """

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
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "adamw_8bit",
        "paged_adamw_8bit",
        "lion_32bit",
        "lion_8bit",
        "schedule_free_adamw",
    ]
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
    fp8_base: bool
    lora_r: Count
    lora_alpha: Count
    lora_dropout: Share
    lora_target_modules: Literal["all-linear"] | list[str]
    use_dora: bool
    use_rslora: bool
    loraplus_lr_ratio: Positive | None
    eval_steps: Count | None
    per_device_eval_batch_size: Count
    eval_packing: bool
    early_stopping_patience: Count | None
    early_stopping_min_delta: Annotated[float, Field(ge=0)]
    load_best_model_at_end: bool
    save_steps: Count
    save_total_limit: Count
    logging_steps: Count
    max_loss_ratio: Annotated[float, Field(gt=1)] | None
    step_timeout_seconds: Count
    seed: Steps

    @property
    def ranks(self) -> int:
        """Number of processes, once the machine is known (`tasks.sft.backend.with_processes`)."""
        assert self.num_processes != "auto"
        return self.num_processes

    @model_validator(mode="after")
    def _values_fit_together(self) -> "SftParams":
        from tasks.sft.conflicts import find_conflicts

        if found := list(find_conflicts(self)):
            raise ValueError("\n  sft: ".join(found))
        return self
