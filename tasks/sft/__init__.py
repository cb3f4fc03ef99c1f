"""Supervised fine-tuning: data/pack and data/base -> data/sft.

`python -m tasks.sft` compiles the plan, launches one process for each rank with DeepSpeed
(`tasks.sft.worker`), and accepts the result only with its success marker: the `deepspeed` launcher
can exit with 0 although a rank was killed.
"""

from typing import Annotated, Literal

from pydantic import Field

from tasks.config import StageParams

Count = Annotated[int, Field(strict=True, ge=1)]


class SftParams(StageParams):
    """Hyper-parameters; names and meaning are those of transformers, TRL and PEFT.

    Attributes:
        num_processes: Ranks.
        per_device_train_batch_size: Packed rows in one forward pass of one rank.
        gradient_accumulation_steps: Forward passes before an optimiser step.
        num_train_epochs: Passes over the packed rows.
        max_steps: Optimiser steps at most, or None.
        learning_rate: Peak learning rate.
        lr_scheduler_type: Shape of the learning rate after the warm-up.
        warmup_steps: Optimiser steps of linear warm-up.
        weight_decay: Decoupled weight decay, not on biases and norms.
        max_grad_norm: Clipping norm; 0 is off.
        precision: Arithmetic of the forward and backward pass.
        attn_implementation: Attention kernel.
        zero_stage: DeepSpeed ZeRO stage.
        lora_r: LoRA rank.
        lora_alpha: LoRA scale times rank.
        save_steps: Optimiser steps between checkpoints.
        logging_steps: Optimiser steps between metrics.
        seed: Seed of row order and new weights.
    """

    num_processes: Count
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    num_train_epochs: Count
    max_steps: Count | None
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    warmup_steps: Annotated[int, Field(strict=True, ge=0)]
    weight_decay: Annotated[float, Field(ge=0, lt=1)]
    max_grad_norm: Annotated[float, Field(ge=0)]
    precision: Literal["auto", "bf16", "fp32"]
    attn_implementation: Literal["sdpa", "eager"]
    zero_stage: Literal[0, 1, 2]
    lora_r: Count
    lora_alpha: Count
    save_steps: Count
    logging_steps: Count
    seed: Annotated[int, Field(strict=True, ge=0)]
