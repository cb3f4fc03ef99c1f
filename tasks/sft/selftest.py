"""Self-test of the wrapped model before step 1; every fault that it catches is silent.

Isolation: examples packed into one row must not attend to each other. It fails if an attention mask is
passed, the KV cache is on, or position_ids do not restart. Gradients: those of a packed row must be the
sum of those of its examples, so that neither packing nor gradient accumulation changes what is learned;
they must reach the trainable weights. Saving: a saved model loaded from disk must give the logits of the
live model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch

from nightshift.core.errors import StageError
from nightshift.data.encode import IGNORED

# Loss and outputs of one collated row, from the training function itself.
Forward = Callable[[dict[str, Any]], tuple[torch.Tensor, Any]]
# Tokens of an example that the checks use. They compute all logits, without activation checkpointing, so
# longer examples could need more memory than training; two kernel blocks of 128 tokens are enough.
EXAMPLE_TOKENS = 256
# Maximum relative difference of two sums in different order. In fp32 a sum over 150,000 tokens may be
# off by 1e-2 (n * 2**-24); one over 49,152 was off by 1e-4 (sequential CPU kernel). Thirty bf16 layers
# gave 0.05. Examples that attend to each other, or a mean instead of a sum, give more than 0.5.
TOLERANCE = {"fp32": 1e-2, "tf32": 1e-2, "bf16": 0.25, "fp16": 0.1}
# Maximum distance of the loaded model from the live model (0), relative to one without its adapter (1).
RELOAD_TOLERANCE = {"fp32": 0.05, "tf32": 0.05, "bf16": 0.5, "fp16": 0.5}


class PackedRow(TypedDict):
    """Examples in one row, as the trainer reads them.

    Attributes:
        input_ids: Token ids of all examples.
        labels: Token ids, or -100 where no loss is computed.
        seq_lengths: Tokens of each example.
    """

    input_ids: list[int]
    labels: list[int]
    seq_lengths: list[int]


def find_row(rows: Sequence[PackedRow]) -> PackedRow | None:
    """Return two cropped examples that share a row and have labels, or None if there is no such row.

    Raises:
        StageError: No row has a label.
    """
    has_label = False
    for row in rows:
        examples = [take(row, i, i + 1) for i in range(len(row["seq_lengths"]))]
        # The first token of an example is never a prediction target.
        labelled = [one for one in examples if any(label != IGNORED for label in one["labels"][1:])]
        has_label = has_label or bool(labelled)
        if len(labelled) > 1:
            first, second = (crop(one) for one in labelled[:2])
            return join(first, second)
    if not has_label:
        raise StageError("self-test: no row has a label, so nothing would be learned; check data/pack")
    return None


def join(first: PackedRow, second: PackedRow) -> PackedRow:
    """Return the examples of two rows as one row."""
    return {
        "input_ids": [*first["input_ids"], *second["input_ids"]],
        "labels": [*first["labels"], *second["labels"]],
        "seq_lengths": [*first["seq_lengths"], *second["seq_lengths"]],
    }


def crop(example: PackedRow) -> PackedRow:
    """Return the end of a labelled example, up to its last label.

    Example:
        >>> crop({"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "seq_lengths": [3]})
        {'input_ids': [1, 2], 'labels': [-100, 2], 'seq_lengths': [2]}
    """
    stop = max(i for i, label in enumerate(example["labels"]) if label != IGNORED) + 1
    start = max(0, stop - EXAMPLE_TOKENS)
    return {
        "input_ids": example["input_ids"][start:stop],
        "labels": example["labels"][start:stop],
        "seq_lengths": [stop - start],
    }


def take(row: PackedRow, start: int, stop: int) -> PackedRow:
    """Return a range of examples of a row, as a row.

    Example:
        >>> take({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [1, 2]}, 1, 2)
        {'input_ids': [2, 3], 'labels': [2, 3], 'seq_lengths': [2]}
    """
    lengths = row["seq_lengths"]
    first, last = sum(lengths[:start]), sum(lengths[:stop])
    return {
        "input_ids": row["input_ids"][first:last],
        "labels": row["labels"][first:last],
        "seq_lengths": lengths[start:stop],
    }


@torch.no_grad()
def check_isolation(
    forward: Forward, batch: dict[str, Any], length: int, vocab_size: int, tolerance: float = 0.0
) -> dict[str, Any]:
    """Change every token of the first example: the logits of the second must stay bit-identical.

    Both passes have equal shapes and kernels, so an exact comparison holds in every precision, except in a
    mixture of experts: there, the tokens of the first example change the size of each expert's product.

    Args:
        forward: Function from a batch to loss and outputs, with logits at labelled positions.
        batch: Collated row of two examples.
        length: Length of the first example in tokens.
        vocab_size: Vocabulary size in tokens.
        tolerance: Largest change, as a share of the standard deviation of the logits.

    Raises:
        StageError: The logits change.
    """
    labels = batch["labels"][0, 1:]
    second = (labels != IGNORED).nonzero().squeeze(-1) >= length
    before = forward(batch)[1].logits[0, second]
    changed = batch["input_ids"].clone()
    changed[0, :length] = (changed[0, :length] + 1) % vocab_size
    after = forward({**batch, "input_ids": changed})[1].logits[0, second]
    difference = (before - after).abs().max().item()
    if not difference <= tolerance * before.float().std().item():
        raise StageError(
            f"self-test: packed examples attend to each other (logits change by {difference:.3g} when only "
            "another example changes); set another sft.attn_implementation"
        )
    return {"max_logit_difference": difference, "proven": True}


def check_loss(given: float, found: float, precision: str) -> dict[str, Any]:
    """Compare the training loss with the loss of the full logits.

    Args:
        given: Loss of the full logits.
        found: Loss of the training function.
        precision: Precision of training.

    Raises:
        StageError: The losses differ.
    """
    relative = abs(found - given) / max(abs(given), 1e-6)
    if not relative <= TOLERANCE[precision]:
        raise StageError(
            f"self-test: the loss {found:.6g} differs from that of the logits, {given:.6g}: the model does "
            "more with its head than the probe detected; this is a bug, report it"
        )
    return {"relative_difference": float(f"{relative:.2g}"), "proven": True}


def check_gradients(
    backward: Callable[[dict[str, Any]], list[torch.Tensor | None]],
    batches: Sequence[dict[str, Any]],
    precision: str,
) -> dict[str, Any]:
    """Compare the gradients of a packed row with the sum of the gradients of its examples.

    Args:
        backward: Function from a batch to each trainable weight's gradient, or None; changes no weight.
        batches: Packed row, followed by its examples alone.
        precision: Precision of training.

    Raises:
        StageError: The gradients differ, or no weight gets one.
    """
    packed, *alone = [backward(batch) for batch in batches]
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in packed)
    if not reached:
        raise StageError(
            f"self-test: gradients reach 0 of {len(packed)} trainable weights; the adapter is "
            "frozen, or not attached to the trained model"
        )
    difference = norm = 0.0
    for together, *parts in zip(packed, *alone, strict=True):
        if together is not None:
            apart = sum(part for part in parts if part is not None)
            difference += (together - apart).float().square().sum().item()
            norm += together.float().square().sum().item()
    relative = (difference / norm) ** 0.5
    if not relative <= TOLERANCE[precision]:
        raise StageError(
            f"self-test: the gradient of a packed row differs from that of its examples by {relative:.2g} of "
            "its norm; the loss is not a sum over tokens, or the examples attend to each other"
        )
    return {
        "weights_reached": reached,
        "weights": len(packed),
        "relative_difference": float(f"{relative:.2g}"),
    }


@contextmanager
def perturbed(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Temporarily randomize weights: a new adapter has no effect, so losing it would go unnoticed."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.02)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def check_reloaded(
    live: torch.Tensor, base: torch.Tensor, loaded: torch.Tensor, precision: str
) -> dict[str, Any]:
    """Compare the logits of the live model with those of the saved and reloaded one.

    Args:
        live: Logits of the live model, shape (n, vocab).
        base: Logits without the adapter, or zeros for full fine-tuning: the result of a lost adapter.
        loaded: Logits of the model loaded from disk.
        precision: Precision of training; kernels of another device round half precision differently.

    Raises:
        StageError: The loaded model is too close to the result of a lost adapter.
    """
    far = (live - base).norm().item()
    near = (live - loaded).norm().item()
    if not near <= RELOAD_TOLERANCE[precision] * far:
        raise StageError(
            f"self-test: the logits of the saved model differ from the live model's (distance {near:.3g}; "
            f"without the adapter {far:.3g}); the saved weights differ from the trained ones"
        )
    return {"relative_difference": float(f"{near / far:.2g}"), "proven": True}


def require_saved(folder: Path, names: Sequence[str]) -> int:
    """Check that a saved model contains every trainable weight in full.

    Returns:
        Number of weights.

    Raises:
        StageError: A weight is missing or empty.
    """
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            sizes |= {name: weights.get_slice(name).get_shape()[0] for name in weights.keys()}  # noqa: SIM118
    if lost := sorted(name for name in names if not sizes.get(name)):
        raise StageError(
            f"self-test: the saved model lacks {len(lost)} of {len(names)} weights, such as {lost[0]}; the "
            "saved weights differ from the trained ones"
        )
    return len(names)
