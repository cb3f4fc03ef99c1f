"""Proofs on the model as it trains, wrapped, before step 1; each fault that they catch is silent.

Isolation: examples packed into one row must not see each other. It fails when an attention mask is passed,
the cache is on, or positions do not restart. Gradients: those of a packed row must be the sum of those of its
examples, so that neither packing nor accumulation changes what is learned; they must reach every weight that
trains. Saving: what is saved must give the logits of the live model when it is loaded from the disk.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nightshift.core.errors import StageError
from nightshift.data.encode import IGNORED

# Loss and outputs of one collated row: the very function that trains.
Forward = Callable[[dict[str, Any]], tuple[torch.Tensor, Any]]
Row = dict[str, Any]
# Rows among which the shortest pair of examples is sought.
SOUGHT = 64
# How far two sums of the same terms in another order may be apart, relative to their norm. In single
# precision a sum over 150,000 words may be off by 1e-2 (n * 2**-24); one over 49,152 was by 1e-4, on a
# processor whose kernel adds them one by one. Thirty layers in bf16 gave 0.05. Examples that see each other,
# or a mean in the place of a sum, give more than a half.
TOLERANCE = {"fp32": 1e-2, "tf32": 1e-2, "bf16": 0.25, "fp16": 0.1}
# How far what was loaded may be on the way from the live model, 0, to one without its adapter, 1.
RELOAD_TOLERANCE = {"fp32": 0.05, "tf32": 0.05, "bf16": 0.5, "fp16": 0.5}


def find_row(rows: Sequence[Row]) -> Row | None:
    """Return the first two examples of a row that holds two with labels; None if there is none.

    Of the first rows that have them it is the shortest pair, since the proofs compute it a dozen times.

    Raises:
        StageError: No row has a label at all.
    """
    has_label = False
    pairs: list[Row] = []
    for number, row in enumerate(rows):
        bounds = [0, *row["seq_lengths"][:1], sum(row["seq_lengths"][:2])]
        # The first token of an example is predicted by nothing.
        labelled = [
            any(label != IGNORED for label in row["labels"][start + 1 : stop])
            for start, stop in pairwise(bounds)
        ]
        has_label = has_label or any(labelled)
        if len(row["seq_lengths"]) > 1 and all(labelled):
            pairs.append(take(row, 0, 2))
        if pairs and number >= SOUGHT:
            break
    if not has_label:
        raise StageError("self-test: no row has a label, so nothing would be learned; check data/pack")
    return min(pairs, key=lambda pair: len(pair["input_ids"]), default=None)


def take(row: Row, start: int, stop: int) -> Row:
    """Return some examples of a row, as a row.

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
def isolation(forward: Forward, batch: dict[str, Any], length: int, vocab_size: int) -> dict[str, Any]:
    """Change every token of the first example: the logits of the second must not move one bit.

    Both passes have equal shapes and kernels, so an exact comparison holds in every precision.

    Args:
        forward: Loss and outputs of a batch; the logits are those of the labelled positions.
        batch: One collated row of two examples.
        length: Tokens of the first example.
        vocab_size: Tokens of the vocabulary.

    Raises:
        StageError: They move.
    """
    labels = batch["labels"][0, 1:]
    second = (labels != IGNORED).nonzero().squeeze(-1) >= length
    before = forward(batch)[1].logits[0, second]
    changed = batch["input_ids"].clone()
    changed[0, :length] = (changed[0, :length] + 1) % vocab_size
    after = forward({**batch, "input_ids": changed})[1].logits[0, second]
    difference = (before - after).abs().max().item()
    if difference != 0:
        raise StageError(
            f"self-test: packed examples see each other (logits move by {difference:.3g} when only "
            "another example changes); set sft.attn_implementation to a backend that isolates"
        )
    return {"max_logit_difference": difference, "proven": True}


def same_loss(given: float, found: float, precision: str) -> dict[str, Any]:
    """Compare the loss that trains with that of all logits.

    Args:
        given: Of all logits.
        found: Of the function that trains.
        precision: Arithmetic of the training.

    Raises:
        StageError: They differ.
    """
    relative = abs(found - given) / max(abs(given), 1e-6)
    if not relative <= TOLERANCE[precision]:
        raise StageError(
            f"self-test: the loss {found:.6g} is not that of the logits, {given:.6g}: the model does more "
            "with its head than was seen; this is a bug, report it"
        )
    return {"relative_difference": float(f"{relative:.2g}"), "proven": True}


def gradients(
    backward: Callable[[dict[str, Any]], list[torch.Tensor | None]],
    batches: Sequence[dict[str, Any]],
    precision: str,
) -> dict[str, Any]:
    """Compare the gradients of a packed row with the sum of those of its examples.

    Args:
        backward: Gradient of each weight that trains, None where none arrives; changes no weight.
        batches: The row, and its examples alone.
        precision: Arithmetic of the training.

    Raises:
        StageError: They differ, or reach not a single weight.
    """
    packed, *alone = [backward(batch) for batch in batches]
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in packed)
    if not reached:
        raise StageError(
            f"self-test: gradients reach 0 of {len(packed)} weights that should train; the adapter is "
            "frozen, or not attached to the model that trains"
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
            "its norm; the loss is not a sum over tokens, or the examples see each other"
        )
    return {
        "weights_reached": reached,
        "weights": len(packed),
        "relative_difference": float(f"{relative:.2g}"),
    }


@contextmanager
def perturbed(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Give weights other values for a while: a new adapter does nothing, so its loss would not be seen."""
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


def reloaded(live: torch.Tensor, base: torch.Tensor, loaded: torch.Tensor, precision: str) -> dict[str, Any]:
    """Compare logits of the live model with those of what was saved and loaded again.

    Args:
        live: Of the model that trains, shape (n, vocab).
        base: Without the adapter, or zeros for a full fine-tune: what a lost adapter would give.
        loaded: Of what was loaded from the disk.
        precision: Arithmetic of the training; kernels of another device round half precision otherwise.

    Raises:
        StageError: The loaded model is too near to what a lost adapter would give.
    """
    far = (live - base).norm().item()
    near = (live - loaded).norm().item()
    if not near <= RELOAD_TOLERANCE[precision] * far:
        raise StageError(
            f"self-test: the saved model gives other logits than the live one (distance {near:.3g}, that of "
            f"a lost adapter {far:.3g}); what would be saved is not what trains"
        )
    return {"relative_difference": float(f"{near / far:.2g}"), "proven": True}


def require_saved(folder: Path, names: Sequence[str]) -> int:
    """Check that a saved model holds every weight that trains, whole.

    Returns:
        The number of weights.

    Raises:
        StageError: One is missing or empty.
    """
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            sizes |= {name: weights.get_slice(name).get_shape()[0] for name in weights.keys()}  # noqa: SIM118
    if lost := sorted(name for name in names if not sizes.get(name)):
        raise StageError(
            f"self-test: the saved model lacks {len(lost)} of {len(names)} weights, such as {lost[0]}; what "
            "would be saved is not what trains"
        )
    return len(names)
