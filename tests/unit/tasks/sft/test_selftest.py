"""What the gradient self-test accepts as rounding and what it reports as a fault."""

import pytest
import torch

from nightshift.core.errors import StageError
from tasks.sft.selftest import check_gradients, find_row

WORDS = 150_000


def test_another_summation_order_is_accepted_as_rounding() -> None:
    """Kernels for few positions sum token by token; kernels for many positions sum in blocks."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(WORDS, 4, generator=generator)
    # The gradient of the target token cancels most of the sum of all others.
    terms[0] = -0.99 * terms.sum(0)
    one_by_one = torch.from_numpy(terms.numpy().cumsum(0))[-1]
    in_blocks = terms.double().sum(0).float()
    batches = [{"gradient": [in_blocks]}, {"gradient": [one_by_one]}]
    found = check_gradients(lambda batch: batch["gradient"], batches, "fp32")
    assert 1e-4 < found["relative_difference"] < 1e-2


def test_a_label_only_in_the_packed_row_is_reported_as_a_fault() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, extra = torch.randn(3, 1000, generator=generator)
    batches = [{"gradient": [first + second + 0.1 * extra]}, {"gradient": [first]}, {"gradient": [second]}]
    with pytest.raises(StageError, match=r"differs from that of its examples by 0\.0\d\d of its norm"):
        check_gradients(lambda batch: batch["gradient"], batches, "fp32")


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
    row = find_row([packed((5000, 4000), (6000, 5999))])
    assert row
    assert row["seq_lengths"] == [256, 256]
    assert row["input_ids"] == [*range(3745, 4001), *range(5744, 6000)]
    assert [label for label in row["labels"] if label != -100] == [4000, 5999]


def test_any_two_labelled_examples_of_a_row_are_a_pair() -> None:
    unlabelled, only_first_token = (3, -1), (3, 0)
    row = find_row([packed((9, 5)), packed(unlabelled, (4, 2), only_first_token, (5, 1))])
    assert row == {"input_ids": [0, 1, 2, 0, 1], "labels": [-100, -100, 2, -100, 1], "seq_lengths": [3, 2]}


def test_rows_of_one_example_contain_no_pair() -> None:
    assert find_row([packed((9, 5)), packed((4, 3))]) is None


def test_rows_without_a_label_are_refused() -> None:
    with pytest.raises(StageError, match="no row has a label, so nothing would be learned"):
        find_row([packed((9, -1), (4, 0))])
