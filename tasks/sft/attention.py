"""Attention that transformers does not have: torch's example by example on a processor, and xFormers'.

For a packed row transformers hands torch one mask for all of it, and the kernel computes, for every pair of
tokens of different examples, what the mask then hides: 40 % of a step with rows of 1024 tokens.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks.errors import ConfigError


def attend_by_example(  # noqa: PLR0913 - transformers' signature
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
        attention_mask: Of the whole row; for rows that say nothing of their examples, and on a GPU, where
            many small kernels are slower than a large one.
        cu_seq_lens_q: First token of each example and the end, shape (n_examples + 1,), or None.
        sliding_window: Tokens that a token sees, or None; the mask knows of it.
        more: Further arguments of transformers' function.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and no weights.
    """
    lengths = [] if cu_seq_lens_q is None or query.device.type != "cpu" else cu_seq_lens_q.diff().tolist()
    if not lengths or (sliding_window is not None and max(lengths) > sliding_window):
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **more
        )
        return whole
    examples = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *one, attention_mask=None, **more)[0] for one in examples]
    return torch.cat(outputs, dim=1), None


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

    lengths = [query.shape[2]]
    if cu_seq_lens_q is not None:
        lengths = cu_seq_lens_q.diff().tolist()
    elif position_ids is not None:
        starts = (position_ids[0] == 0).nonzero().squeeze(-1).tolist()
        lengths = [stop - start for start, stop in pairwise([*starts, query.shape[2]])]
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ConfigError(
            "params.yaml: sft.attn_implementation=xformers knows no sliding window, but the model has one of "
            f"{sliding_window} tokens; set sdpa or flash_attention_2"
        )
    repeats = query.shape[1] // key.shape[1]
    states = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
    output = ops.memory_efficient_attention(
        *(one.transpose(1, 2) for one in states),
        attn_bias=BlockDiagonalCausalMask.from_seqlens(lengths),
        p=dropout,
        scale=scaling,
    )
    return output, None


AttentionInterface.register("sdpa", attend_by_example)
AttentionInterface.register("xformers", attend_with_xformers)
