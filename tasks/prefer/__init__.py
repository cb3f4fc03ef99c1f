"""Preference tuning of the SFT model by TRL: data/decontaminate and data/sft -> data/prefer. Off by default.

DPO (Rafailov et al., arXiv 2305.18290) learns from pairs of a good and a bad answer to one prompt, KTO
(Ethayarajh et al., arXiv 2402.01306) from single answers, each good or bad. The model
of `sft` is trained further, with the same adapter or the same weights, and is its own reference: its
log-probabilities are computed once, before step 1. Launch, plan, checkpoints, resume and errors are those of
`tasks.sft`, and so is every parameter that this section does not have.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nightshift.core.config import Count, StageParams
from nightshift.data.drops import Rate
from tasks.sft import Interval, Positive, Share, Steps

LossType = Literal["sigmoid", "hinge", "ipo"]


class PreferParams(StageParams):
    """Hyperparameters, with the names and meaning of TRL.

    Attributes:
        method: dpo, kto, or None: the model of `sft` is the result.
        beta: Strength of the reference: a higher value keeps the model closer to it. For ipo, its tau.
        loss_type: Loss of a pair; KTO has its own.
        desirable_weight: Weight of the loss of a good answer in KTO.
        undesirable_weight: Weight of the loss of a bad one.
        learning_rate: Peak learning rate.
        lr_scheduler_type: Learning rate schedule after warmup.
        warmup_ratio: Warmup as a fraction of all steps, 0 to below 1.
        num_train_epochs: Passes over the pairs.
        max_steps: Maximum number of optimizer steps, or None.
        per_device_train_batch_size: Pairs per forward pass of one rank.
        gradient_accumulation_steps: Forward passes per optimizer step.
        per_device_eval_batch_size: Pairs per forward pass of an evaluation, and of the reference.
        max_length: Maximum tokens of a prompt with an answer; a longer one is left out.
        max_drop_rate: Highest rate of comparisons, 0 to 1, that are left out.
        eval_steps: Optimizer steps between evaluations on the validation set, as a number or as a share of
            all steps, or None.
        save_steps: Optimizer steps between checkpoints, as a number or as a share of all steps.
        seed: Seed of the row order.
    """

    method: Literal["dpo", "kto"] | None
    beta: Positive
    loss_type: LossType
    desirable_weight: Positive
    undesirable_weight: Positive
    learning_rate: Positive
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    warmup_ratio: Share
    num_train_epochs: Count
    max_steps: Count | None
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    per_device_eval_batch_size: Count
    max_length: Annotated[int, Field(strict=True, ge=8)]
    max_drop_rate: Rate
    eval_steps: Interval | None
    save_steps: Interval
    seed: Steps

    @model_validator(mode="after")
    def _kto_has_what_it_needs(self) -> "PreferParams":
        if self.method != "kto":
            return self
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                "per_device_train_batch_size=1, but KTO compares the answers of a forward pass with other "
                "prompts; set 2 or more"
            )
        if self.loss_type != "sigmoid":
            raise ValueError(f"loss_type={self.loss_type} is a loss of pairs; set sigmoid, or method: dpo")
        return self
