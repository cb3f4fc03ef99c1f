"""Attention in C gives an example the same bits alone and in any row."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.sft import native


@pytest.fixture(autouse=True, scope="module")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cpu_flags", lambda: {native.NEEDS})
        patch.setenv("NIGHTSHIFT_HOME", str(tmp_path_factory.mktemp("state")))
        native.load_kernels.cache_clear()
        native.load_kernels()
        yield
    native.load_kernels.cache_clear()


def run(states: list[torch.Tensor], pulled: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Return the output and the gradients of the states."""
    leaves = [state.clone().requires_grad_() for state in states]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    output = native.Attention.apply(*leaves, ends, 0.25)  # type: ignore[no-untyped-call]
    return [output.detach(), *torch.autograd.grad(output, leaves, pulled)]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=5),
    group=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([16, 48, 64]),
    seed=st.integers(0, 1000),
)
def test_an_example_is_computed_alike_in_any_row(
    lengths: list[int], group: int, width: int, seed: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    heads = (2 * group, 2, 2, 2 * group)
    *states, pulled = (
        torch.randn(sum(lengths), count, width, generator=chance).bfloat16() for count in heads
    )
    row = run(states, pulled, lengths)
    split = zip(*(tensor.split(lengths) for tensor in (*states, pulled)), strict=True)
    for i, (*own, own_pulled) in enumerate(split):
        alone = run([one.contiguous() for one in own], own_pulled.contiguous(), [lengths[i]])
        assert all(torch.equal(tensor.split(lengths)[i], one) for tensor, one in zip(row, alone, strict=True))
