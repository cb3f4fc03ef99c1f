"""The loss of a batch: summed over its labelled tokens, which alone get logits."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nightshift.data.encode import IGNORED
from tasks.sft.fused import LossHead


def summed_loss(
    model: Any, inputs: dict[str, Any], label_smoothing: float = 0.0, head: LossHead | None = None
) -> tuple[torch.Tensor, Any]:
    """Sum the negative log-likelihoods of a batch, in nats.

    Only labelled positions are scored: with three quarters of the tokens unlabelled, the other logits
    would take a third of the step.

    Args:
        model: Causal language model, wrapped or not.
        inputs: Collated rows: one flattened row, or several padded ones.
        label_smoothing: Probability mass spread over the vocabulary, 0 to 1.
        head: Loss head that computes the loss in chunks; None computes all logits.

    Returns:
        The sum, a scalar, and the model outputs; with a head, their logits contain the loss.
    """
    labels = inputs["labels"][:, 1:]
    keep = (labels != IGNORED).any(0).nonzero().squeeze(-1)
    labels = labels[:, keep]
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if head:
        with head.with_labels(labels, label_smoothing):
            outputs = model(**given, use_cache=False, logits_to_keep=keep)
        return outputs.logits.sum(), outputs
    outputs = model(**given, use_cache=False, logits_to_keep=keep)
    logits = outputs.logits.flatten(0, 1).float()
    return cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=label_smoothing), outputs


def pick(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Select the labelled positions of the logits that `summed_loss` requested, shape (n, vocab)."""
    is_labelled = labels[:, 1:] != IGNORED
    return logits[is_labelled[:, is_labelled.any(0)]]


def token_lengths(inputs: dict[str, Any]) -> torch.Tensor:
    """Return the length of the example that each token belongs to, shape (1, n_tokens).

    For padded rows, one length for each row, shape (n_rows, 1).

    Example:
        >>> row = {"input_ids": torch.ones(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
        >>> token_lengths(row).tolist()
        [[2, 2, 3, 3, 3]]
        >>> token_lengths({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}).tolist()
        [[3], [2]]
    """
    if "attention_mask" in inputs:
        rows: torch.Tensor = inputs["attention_mask"].sum(1, keepdim=True)
        return rows
    lengths: torch.Tensor = inputs["cu_seq_lens_q"].diff().long()
    # With a given output size, no GPU synchronization is needed.
    return lengths.repeat_interleave(lengths, output_size=inputs["input_ids"].shape[1])[None]
