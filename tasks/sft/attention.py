"""Attention kernels for packed rows that transformers does not have, registered under names of their own.

Given a packed row, transformers hands torch's `sdpa` one mask for all of it, and the kernel computes, for
every pair of tokens of different examples, what the mask then hides: 40 % of a processor's step with rows of
1024 tokens. These kernels go by the ends of the examples instead:

- `sdpa_per_example`: torch's sdpa, one example after the other; for a processor.
- `torch_varlen`: torch's own flash attention (torch 2.10 on); needs a GPU and half precision, and no package.
- `xformers`: xFormers' kernel; needs a GPU.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nightshift.core.errors import ConfigError


def attend_per_example(  # noqa: PLR0913 - transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each example, causally.

    Args:
        module: The layer.
        query: Shape (1, n_heads, n_tokens, width); key and value have as many heads or fewer.
        key: As query.
        value: As query.
        attention_mask: Of the whole row; for rows that say nothing of their examples, and for windows.
        cu_seq_lens_q: First token of each example and the end, shape (n_examples + 1,), or None.
        sliding_window: Tokens that a token sees, or None; the mask knows of it.
        more: Further arguments of transformers' function.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and no weights.
    """
    lengths = [] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    if not lengths or (sliding_window is not None and max(lengths) > sliding_window):
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **more
        )
        return whole
    examples = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *one, attention_mask=None, **more)[0] for one in examples]
    return torch.cat(outputs, dim=1), None


def attend_varlen(  # noqa: PLR0913 - transformers' signature
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers has none for this kernel
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each example of a row, causally, with torch's own flash attention.

    Args:
        query: Shape (1, n_heads, n_tokens, width); key and value have as many heads or fewer.
        key: As query.
        value: As query.
        attention_mask: Not used.
        dropout: Share of the weights that are dropped; the kernel knows none but 0.
        scaling: Factor of the scores; None for one over the root of the width.
        cu_seq_lens_q: First token of each example and the end, shape (n_examples + 1,), or None.
        max_length_q: Tokens of the longest example, or None.
        position_ids: Positions, shape (1, n_tokens); without boundaries an example begins where they are 0.
        sliding_window: Tokens that a token sees, itself included, or None.
        softcap: Bound of the scores; the kernel knows none.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and no weights.

    Raises:
        ConfigError: The model has a dropout or a soft cap in its attention.
    """
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    if dropout or softcap:
        raise ConfigError(
            f"params.yaml: sft.attn_implementation=torch_varlen knows neither dropout ({dropout}) nor soft "
            f"cap ({softcap}); set flash_attention_2 or flex_attention"
        )
    query, key, value = in_one_type(query, key, value)
    if cu_seq_lens_q is None or max_length_q is None:
        lengths = example_lengths(query, cu_seq_lens_q, position_ids)
        cu_seq_lens_q = torch.tensor([0, *lengths], device=query.device).cumsum(0)
        max_length_q = max(lengths)
    ends, longest = cu_seq_lens_q.int(), int(max_length_q)
    more: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(attend).parameters:
        more["enable_gqa"] = True
    else:
        key, value = repeat_heads(query, key, value)
    states = [one[0].transpose(0, 1) for one in (query, key, value)]
    # The kernel counts what is left of a token, transformers the token too.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = attend(*states, ends, ends, longest, longest, scale=scaling, window_size=window, **more)
    return output[None], None


def attend_with_xformers(  # noqa: PLR0913 - transformers' signature
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers has none for this kernel
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each example of a row, causally, with xFormers' kernel (it needs a GPU).

    Args:
        query: Shape (1, n_heads, n_tokens, width); key and value have as many heads or fewer.
        key: As query.
        value: As query.
        attention_mask: Not used.
        dropout: Share of the weights that are dropped, 0 to 1.
        scaling: Factor of the scores; None for one over the root of the width.
        cu_seq_lens_q: First token of each example and the end, shape (n_examples + 1,), or None.
        position_ids: Positions, shape (1, n_tokens); without boundaries an example begins where they are 0.
        sliding_window: Tokens that a token sees, or None.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and no weights.

    Raises:
        ConfigError: A window is smaller than an example.
    """
    from xformers import ops
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    lengths = example_lengths(query, cu_seq_lens_q, position_ids)
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ConfigError(
            "params.yaml: sft.attn_implementation=xformers knows no sliding window, but the model has one of "
            f"{sliding_window} tokens; set sdpa or flash_attention_2"
        )
    query, key, value = in_one_type(query, *repeat_heads(query, key, value))
    output = ops.memory_efficient_attention(
        *(one.transpose(1, 2) for one in (query, key, value)),
        attn_bias=BlockDiagonalCausalMask.from_seqlens(lengths),
        p=dropout,
        scale=scaling,
    )
    return output, None


def attend_flexibly(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *more: Any,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' flex_attention does, which takes states of one type only."""
    found: tuple[torch.Tensor, torch.Tensor | None] = flex_attention_forward(
        module, *in_one_type(query, key, value), *more, **rest
    )
    return found


def in_one_type(*states: torch.Tensor) -> list[torch.Tensor]:
    """Return states in the type of the values, the last.

    Autocast over full-precision weights makes values in half precision, and rotates queries and keys in full.
    """
    return [one.to(states[-1].dtype) for one in states]


def repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return key and value with a head for each of the query's."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def example_lengths(
    query: torch.Tensor, cu_seq_lens_q: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[int]:
    """Return the tokens of each example in a row, by what is known of it."""
    if cu_seq_lens_q is not None:
        lengths: list[int] = cu_seq_lens_q.diff().tolist()
        return lengths
    if position_ids is None:
        return [query.shape[2]]
    starts = (position_ids[0] == 0).nonzero().squeeze(-1).tolist()
    return [stop - start for start, stop in pairwise([*starts, query.shape[2]])]


AttentionInterface.register("sdpa_per_example", attend_per_example)
AttentionMaskInterface.register("sdpa_per_example", sdpa_mask)
AttentionInterface.register("torch_varlen", attend_varlen)
AttentionInterface.register("xformers", attend_with_xformers)
AttentionInterface.register("flex_attention", attend_flexibly)
