"""Proofs on the real model before step 1. Each fault they catch would train without an error.

Isolation: examples packed into one row must not see each other. It fails silently when an attention
mask is passed, the cache is on, or positions do not restart. Gradients: they must reach the trainable
weights and nothing else.
"""

from typing import Any

import torch

from tasks.errors import StageError


def run(model: Any, batch: dict[str, Any], length: int) -> dict[str, Any]:
    """Run all proofs.

    Args:
        model: The model with its adapter, as it will train.
        batch: One collated row with at least two packed examples.
        length: Tokens of the first example in the row.

    Returns:
        The measured values, JSON-ready.

    Raises:
        StageError: A proof fails; training must not start.
    """
    return {"isolation": isolation(model, batch, length), "gradients": gradients(model, batch)}


@torch.no_grad()
def isolation(model: Any, batch: dict[str, Any], length: int) -> dict[str, Any]:
    """Change every token of the first example: the logits of the others must not move one bit.

    Both passes have equal shapes and kernels, so an exact comparison holds in every precision.
    """
    before = model(**_inputs(batch)).logits[0, length:]
    changed = batch["input_ids"].clone()
    changed[0, :length] = (changed[0, :length] + 1) % model.config.vocab_size
    after = model(**_inputs({**batch, "input_ids": changed})).logits[0, length:]
    difference = (before - after).abs().max().item()
    if difference != 0:
        raise StageError(
            f"self-test: packed examples see each other (logits move by {difference:.3g} when only "
            "another example changes); set sft.attn_implementation to a backend that isolates"
        )
    return {"max_logit_difference": difference, "proven": True}


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Run one backward pass: trainable weights must get a gradient, frozen ones none."""
    loss = model(**_inputs(batch), labels=batch["labels"]).loss
    if not torch.isfinite(loss):
        raise StageError(f"self-test: the loss of the first row is {loss.item()}; check data/pack")
    if loss.requires_grad:
        loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    model.zero_grad(set_to_none=True)
    if not reached or reached & frozen:
        raise StageError(
            f"self-test: gradients reach {len(reached)} weights, {len(reached & frozen)} of them "
            "frozen; the adapter is not attached to the model that trains"
        )
    return {"weights_reached": len(reached), "frozen_reached": 0, "loss": round(loss.item(), 4)}


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k != "labels"} | {"use_cache": False}
