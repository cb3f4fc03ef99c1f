"""Self-test of the wrapped model before step 1; every fault that it catches is silent.

The reference is transformers' own eager attention, one example at a time. Isolation: the examples of a
batch must not attend to each other, as the collator makes it. It fails if an attention mask is passed, the
KV cache is on, or position_ids do not restart. Gradients: those of a batch must be the sum of those of its
examples, so that neither packing nor gradient accumulation changes what is learned; they must reach all
trainable weights. Saving: a saved model loaded from disk must have the weights, and give the logits, of the
live model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch

from nightshift.core.errors import StageError
from nightshift.data.encode import IGNORED

# The gradient of each trainable weight, or None.
Gradients = Sequence[torch.Tensor | None]
# Tokens of an example that the checks use. They compute all logits, without activation checkpointing, so
# longer examples could need more memory than training; two kernel blocks of 128 tokens are enough.
EXAMPLE_TOKENS = 256
# Maximum relative difference of two sums in different order. In fp32 a sum over 150,000 tokens may be
# off by 1e-2 (n * 2**-24); one over 49,152 was off by 1e-4 (sequential CPU kernel). Thirty bf16 layers
# gave 0.05. Examples that attend to each other, or a mean instead of a sum, give more than 0.5.
TOLERANCE = {"fp32": 1e-2, "tf32": 1e-2, "bf16": 0.25, "fp16": 0.1}
# Distance of the logits of two kernels, in standard deviations, from rounding alone.
KERNEL_NOISE = {"fp32": 1e-5, "tf32": 3e-3, "fp16": 1e-2, "bf16": 5e-2}
# Rounding of float32.
EPSILON = 2.0**-23
# How many times as large as rounding a fault must be to be told apart.
CLEAR = 4
# Examples that are searched for two in one row.
SINGLES = 1000


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


def find_pair(rows: Sequence[PackedRow], longest: int = EXAMPLE_TOKENS) -> list[PackedRow] | None:
    """Return two cropped examples with labels as rows for the collator: one packed row, or two rows.

    Args:
        rows: Rows of the training set.
        longest: Maximum tokens of an example.

    Returns:
        One or two rows, or None if only one example has labels.

    Raises:
        StageError: No row has a label.
    """
    singles: list[PackedRow] = []
    for row in rows:
        examples = [take(row, i, i + 1) for i in range(len(row["seq_lengths"]))]
        # The first token of an example is never a prediction target.
        labelled = [one for one in examples if any(label != IGNORED for label in one["labels"][1:])]
        if len(labelled) > 1:
            first, second = (crop(one, longest) for one in labelled[:2])
            return [join(first, second)]
        singles += labelled
        if len(singles) == SINGLES:
            break
    if not singles:
        raise StageError("self-test: no row has a label, so nothing would be learned; check data/pack")
    return [crop(one, longest) for one in singles[:2]] if len(singles) > 1 else None


def join(first: PackedRow, second: PackedRow) -> PackedRow:
    """Return the examples of two rows as one row."""
    return {
        "input_ids": [*first["input_ids"], *second["input_ids"]],
        "labels": [*first["labels"], *second["labels"]],
        "seq_lengths": [*first["seq_lengths"], *second["seq_lengths"]],
    }


def split(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """Return every example of some rows as a row of its own."""
    return [take(row, i, i + 1) for row in rows for i in range(len(row["seq_lengths"]))]


def crop(example: PackedRow, longest: int = EXAMPLE_TOKENS) -> PackedRow:
    """Return the end of a labelled example, up to its last label, and at most `longest` tokens.

    Example:
        >>> crop({"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "seq_lengths": [3]})
        {'input_ids': [1, 2], 'labels': [-100, 2], 'seq_lengths': [2]}
    """
    stop = max(i for i, label in enumerate(example["labels"]) if label != IGNORED) + 1
    start = max(0, stop - longest)
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


def distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Return the root mean square difference of logits, in standard deviations of the others."""
    difference = (logits.float() - others.float()).square().mean().sqrt()
    return (difference / others.float().std()).item()


def bound(noise: float, fault: float) -> float:
    """Return the distance that separates rounding from a fault: their geometric mean.

    Args:
        noise: Distance of two results that differ by rounding; at least that of float32.
        fault: Distance that the fault causes.

    Example:
        >>> round(bound(1e-6, 1.0), 6)
        0.001
    """
    return math.sqrt(max(noise, EPSILON) * fault)


def check_isolation(found: Mapping[str, float], noise: float, leak: float, precision: str) -> dict[str, Any]:
    """Check that the logits of an example depend on no other example of its batch.

    Args:
        found: Distances of the second example's logits when only the first example changes, as `moved`
            with and `moved_by_positions` without boundaries, and from eager attention alone, as `eager`.
        noise: Distance when only the partner in a batch of separate rows changes; 0 except for a mixture of
            experts, where the tokens of one example change the size of each expert's product.
        leak: Distance when the second example does attend to the first.
        precision: Precision of training.

    Raises:
        StageError: The examples attend to each other, or rounding would hide it.
    """
    limits = {name: bound(noise, leak) for name in found}
    limits["eager"] = bound(max(noise, KERNEL_NOISE[precision]), leak)
    if leak < CLEAR * noise:
        raise StageError(
            f"self-test: an example that sees another changes by {leak:.2g} standard deviations, and by "
            f"{noise:.2g} from rounding: a leak between examples would not show; set sft.precision to fp32"
        )
    for name, value in found.items():
        if not value <= limits[name]:
            what = "differ from eager attention, one example at a time," if name == "eager" else "change"
            raise StageError(
                f"self-test: packed examples attend to each other (logits {what} by {value:.3g} standard "
                f"deviations; rounding by {noise:.2g}, a full leak by {leak:.2g}); set another "
                "sft.attn_implementation"
            )
    figures = {**found, "noise": noise, "leak": leak}
    return {name: float(f"{value:.2g}") for name, value in figures.items()} | {"proven": True}


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
    packed: Gradients, alone: Sequence[Gradients], precision: str, names: Sequence[str]
) -> dict[str, Any]:
    """Compare the gradients of a batch with the sum of the gradients of its examples.

    Args:
        packed: Gradient of each trainable weight for the batch, or None.
        alone: The same for each of its examples alone.
        precision: Precision of training.
        names: Names of the weights.

    Raises:
        StageError: The gradients differ, or do not reach every weight that must train.
    """
    missing = [name for name, gradient in zip(names, packed, strict=True) if not is_reached(gradient)]
    # An expert that no token of these examples chose has no gradient now, and gets one later.
    idle = [name for name in missing if ".experts." in name]
    reached = len(names) - len(missing)
    if not reached or len(missing) > len(idle):
        example = next((name for name in missing if name not in idle), "none")
        raise StageError(
            f"self-test: gradients reach {reached} of {len(names)} trainable weights, and not {example}; the "
            "adapter is frozen or not attached to the trained model, or the model does not use this weight"
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
            f"self-test: the gradient of a batch differs from that of its examples by {relative:.2g} of "
            "its norm; the loss is not a sum over tokens, or the examples attend to each other"
        )
    return {
        "weights_reached": reached,
        "weights": len(names),
        "experts_without_tokens": len(idle),
        "relative_difference": float(f"{relative:.2g}"),
    }


def is_reached(gradient: torch.Tensor | None) -> bool:
    """Return whether a gradient exists and is not 0 everywhere."""
    return gradient is not None and bool(gradient.any())


@contextmanager
def perturbed(parameters: Sequence[torch.nn.Parameter], std: float) -> Iterator[None]:
    """Temporarily randomize weights: a new adapter has no effect, so losing it would go unnoticed.

    Args:
        parameters: Weights that are 0 in a new adapter.
        std: Standard deviation of the random weights.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=std)
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
    far, near, noise = distance(base, live), distance(loaded, live), KERNEL_NOISE[precision]
    if far < CLEAR * noise:
        return {"not_compared": f"the adapter changes the logits by {far:.2g}, rounding by {noise:.2g}"}
    if not near <= bound(noise, far):
        raise StageError(
            f"self-test: the logits of the saved model differ from the live model's (distance {near:.3g}; "
            f"without the adapter {far:.3g}); the saved weights differ from the trained ones"
        )
    return {"relative_difference": float(f"{near / far:.2g}"), "proven": True}
