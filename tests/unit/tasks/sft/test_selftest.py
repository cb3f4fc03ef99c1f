"""What the gradient self-test accepts as rounding and what it reports as a fault."""

import pytest
import torch

from nightshift.core.errors import StageError
from tasks.sft.selftest import check_gradients, check_isolation, find_pair

WORDS = 150_000


def test_another_summation_order_is_accepted_as_rounding() -> None:
    """Kernels for few positions sum token by token; kernels for many positions sum in blocks."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(WORDS, 4, generator=generator)
    # The gradient of the target token cancels most of the sum of all others.
    terms[0] = -0.99 * terms.sum(0)
    one_by_one = torch.from_numpy(terms.numpy().cumsum(0))[-1]
    in_blocks = terms.double().sum(0).float()
    found = check_gradients([in_blocks], [[one_by_one]], "fp32", ["weight"])
    assert 1e-4 < found["relative_difference"] < 1e-2


def test_a_label_only_in_the_packed_row_is_reported_as_a_fault() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, extra = torch.randn(3, 1000, generator=generator)
    together, alone = [first + second + 0.1 * extra], [[first], [second]]
    with pytest.raises(StageError, match=r"differs from that of its examples by 0\.0\d\d of its norm"):
        check_gradients(together, alone, "fp32", ["weight"])


def test_a_gradient_must_reach_every_weight_but_experts_without_tokens() -> None:
    """Adapters without gradients would be saved as they were made: 4 of 28 once counted as a success."""
    some, none = torch.ones(3), torch.zeros(3)
    names = ["layers.0.q_proj", "layers.0.mlp.experts.3.up_proj"]
    found = check_gradients([some, none], [[some, None]], "fp32", names)
    assert (found["weights_reached"], found["weights"], found["experts_without_tokens"]) == (1, 2, 1)
    for lost in (none, None):
        with pytest.raises(StageError, match=r"reach 1 of 2 trainable weights, and not layers\.0\.q_proj;"):
            check_gradients([lost, some], [[lost, some]], "fp32", names)
    with pytest.raises(StageError, match="reach 0 of 1 trainable weights"):
        check_gradients([none], [[none]], "fp32", ["layers.0.mlp.experts.3.up_proj"])


def test_a_leak_is_told_from_rounding_by_the_distance_of_both() -> None:
    found = check_isolation({"moved": 0.0, "eager": 4e-7}, noise=0.0, leak=0.9, precision="fp32")
    assert found == {"moved": 0.0, "eager": 4e-7, "noise": 0.0, "leak": 0.9, "proven": True}
    # Experts in half precision.
    assert check_isolation({"moved": 0.02, "eager": 0.05}, noise=0.01, leak=0.9, precision="bf16")["proven"]
    with pytest.raises(StageError, match=r"logits change by 0\.02 standard .* a full leak by 0\.9"):
        check_isolation({"moved": 0.02, "eager": 0.05}, noise=0.0, leak=0.9, precision="bf16")
    with pytest.raises(StageError, match=r"logits differ from eager attention, .* by 0\.1 "):
        check_isolation({"moved": 0.0, "eager": 0.1}, noise=0.0, leak=0.9, precision="fp32")
    with pytest.raises(StageError, match="a leak between examples would not show"):
        check_isolation({"moved": 0.0, "eager": 0.0}, noise=0.3, leak=0.9, precision="bf16")


def packed(*examples: tuple[int, int]) -> dict[str, list[int]]:
    """Return a row of examples, each given by its length and the position of its only label, or -1."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for length, position in examples:
        ids = list(range(length))
        row["input_ids"] += ids
        row["labels"] += [token if token == position else -100 for token in ids]
        row["seq_lengths"].append(length)
    return row


def test_long_examples_are_cropped_to_their_last_labels() -> None:
    """The checks compute all logits without activation checkpointing: the memory must stay small."""
    (row,) = find_pair([packed((5000, 4000), (6000, 5999))]) or ()
    assert row["seq_lengths"] == [256, 256]
    assert row["input_ids"] == [*range(3745, 4001), *range(5744, 6000)]
    assert [label for label in row["labels"] if label != -100] == [4000, 5999]


def test_any_two_labelled_examples_of_a_row_are_a_pair() -> None:
    unlabelled, only_first_token = (3, -1), (3, 0)
    (row,) = find_pair([packed((9, 5)), packed(unlabelled, (4, 2), only_first_token, (5, 1))]) or ()
    assert row == {"input_ids": [0, 1, 2, 0, 1], "labels": [-100, -100, 2, -100, 1], "seq_lengths": [3, 2]}


def test_rows_of_one_example_are_a_pair_of_rows() -> None:
    """Unpacked rows share a batch as soon as a micro-batch, or an evaluation, has two of them."""
    pair = find_pair([packed((9, 5)), packed((4, 3))])
    assert [row["input_ids"] for row in pair or ()] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    assert find_pair([packed((9, 5)), packed((4, -1))]) is None


def test_rows_without_a_label_are_refused() -> None:
    with pytest.raises(StageError, match="no row has a label, so nothing would be learned"):
        find_pair([packed((9, -1), (4, 0))])
