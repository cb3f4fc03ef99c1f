"""What the gradient self-test accepts as rounding and what it reports as a fault."""

import pytest
import torch

from nightshift.core.errors import StageError
from tasks.sft.selftest import check_gradients

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
