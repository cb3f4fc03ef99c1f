"""Attention kernels for packed rows that transformers lacks, registered under separate names.

For a packed row, transformers passes one mask to torch's `sdpa`. The kernel then computes every pair of
tokens of different examples, which the mask discards: 40 % of a CPU step with rows of 1024 tokens. These
kernels use the example boundaries instead:

- `avx512_per_example`: this stage's own kernel in C, one example after the other; needs bf16 on a CPU with
  AVX-512 BF16, and a C compiler.
- `sdpa_per_example`: torch's sdpa, one example after the other; for CPUs.
- `torch_varlen`: torch's own flash attention (torch >= 2.10); needs a GPU and half precision, no
  package.
- `xformers`: xFormers' kernel; needs a GPU.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nightshift.core.errors import ConfigError
from tasks.sft import native


def attend_per_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Apply causal attention within each example, or the mask if it means anything else.

    Args:
        module: Attention layer.
        query: Query states, shape (1, n_heads, n_tokens, width).
        key: Key states, shape (1, n_kv_heads, n_tokens, width), with n_kv_heads <= n_heads.
        value: Value states, same shape as `key`.
        attention_mask: Mask of the whole row, True where a token attends to another, or None.
        cu_seq_lens_q: Start of each example and end of the row, shape (n_examples + 1,), or None.
        more: Other arguments of transformers' attention function.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and None instead of attention weights.
    """
    if cu_seq_lens_q is None or not is_causal_within(attention_mask, cu_seq_lens_q):
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **more
        )
        return whole
    lengths = cu_seq_lens_q.diff().tolist()
    examples = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *states, attention_mask=None, **more)[0] for states in examples]
    return torch.cat(outputs, dim=1), None


def attend_with_avx512(  # noqa: PLR0913 - transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Apply causal attention within each example of a row with the kernel of `tasks.sft.native`.

    A row without boundaries takes the path of `attend_per_example`.

    Args:
        module: Attention layer.
        query: Query states, shape (1, n_heads, n_tokens, width).
        key: Key states, shape (1, n_kv_heads, n_tokens, width), with n_kv_heads <= n_heads.
        value: Value states, same shape as `key`, in bf16.
        attention_mask: Mask of the whole row, True where a token attends to another, or None.
        dropout: Attention dropout; the kernel supports only 0.
        scaling: Scale of the scores; None for 1 / sqrt(width).
        cu_seq_lens_q: Start of each example and end of the row, shape (n_examples + 1,), or None.
        more: Other arguments of transformers' attention function.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and None instead of attention weights.

    Raises:
        ConfigError: The kernel does not support this machine, model or precision.
    """
    query, key, value = cast_to_value_dtype(query, key, value)
    width = query.shape[-1]
    faults = {
        "dropout": bool(dropout),
        **{name: more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")},
        f"states on {value.device.type}": value.device.type != "cpu",
        f"{value.dtype} states": value.dtype != torch.bfloat16,
        f"heads of width {width}": width % native.MULTIPLE_OF != 0 or value.shape[-1] != width,
    }
    if cu_seq_lens_q is not None:
        faults["windows"] = not is_causal_within(attention_mask, cu_seq_lens_q)
    if found := [name for name, is_fault in faults.items() if is_fault]:
        raise ConfigError(
            f"params.yaml: sft.attn_implementation=avx512_per_example does not support {', '.join(found)}; "
            "set auto"
        )
    native.load_kernels()
    if cu_seq_lens_q is None:
        return attend_per_example(module, query, key, value, attention_mask, scaling=scaling, **more)
    ends = cu_seq_lens_q.int().contiguous()
    states = [state[0].transpose(0, 1).contiguous() for state in (query, key, value)]
    output: torch.Tensor = native.Attention.apply(*states, ends, scaling or width**-0.5)  # type: ignore[no-untyped-call]
    return output[None], None


def is_causal_within(attention_mask: torch.Tensor | None, ends: torch.Tensor) -> bool:
    """Return whether a mask is plainly causal within each example.

    The corners tell: with a window or chunks shorter than an example, its last token does not attend to its
    first; in a bidirectional block, its first token attends to its last.

    Args:
        attention_mask: Mask of the row, True where a token attends to another; None is causal.
        ends: Start of each example and end of the row, shape (n_examples + 1,).

    Example:
        >>> causal, ends = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), torch.tensor([0, 4])
        >>> is_causal_within(causal, ends), is_causal_within(causal.triu(-2), ends)
        (True, False)
    """
    if attention_mask is None:
        return True
    firsts, lasts = ends[:-1].long(), ends[1:].long() - 1
    mask = attention_mask[0, 0]
    return bool((mask[lasts, firsts] & (~mask[firsts, lasts] | (firsts == lasts))).all())


def attend_varlen(  # noqa: PLR0913 - transformers' signature
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers passes none to this kernel
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Apply causal attention within each example of a row with torch's own flash attention.

    Args:
        query: Query states, shape (1, n_heads, n_tokens, width).
        key: Key states, shape (1, n_kv_heads, n_tokens, width), with n_kv_heads <= n_heads.
        value: Value states, same shape as `key`.
        attention_mask: Not used.
        dropout: Attention dropout; the kernel supports only 0.
        scaling: Scale of the scores; None for 1 / sqrt(width).
        cu_seq_lens_q: Start of each example and end of the row, shape (n_examples + 1,), or None.
        max_length_q: Length of the longest example in tokens, or None.
        position_ids: Positions, shape (1, n_tokens); without boundaries each 0 starts an example.
        sliding_window: Window size in tokens, including the token itself, or None.
        softcap: Softcap of the scores; the kernel does not support it.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and None instead of attention weights.

    Raises:
        ConfigError: The model uses attention dropout or a softcap.
    """
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    if dropout or softcap:
        raise ConfigError(
            f"params.yaml: sft.attn_implementation=torch_varlen supports neither dropout ({dropout}) nor "
            f"softcap ({softcap}); set flash_attention_2 or flex_attention"
        )
    query, key, value = cast_to_value_dtype(query, key, value)
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
    states = [state[0].transpose(0, 1) for state in (query, key, value)]
    # The kernel's window excludes the token itself, transformers' includes it.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = attend(*states, ends, ends, longest, longest, scale=scaling, window_size=window, **more)
    return output[None], None


def attend_with_xformers(  # noqa: PLR0913 - transformers' signature
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - transformers passes none to this kernel
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Apply causal attention within each example of a row with xFormers' kernel (needs a GPU).

    Args:
        query: Query states, shape (1, n_heads, n_tokens, width).
        key: Key states, shape (1, n_kv_heads, n_tokens, width), with n_kv_heads <= n_heads.
        value: Value states, same shape as `key`.
        attention_mask: Not used.
        dropout: Attention dropout, 0 to 1.
        scaling: Scale of the scores; None for 1 / sqrt(width).
        cu_seq_lens_q: Start of each example and end of the row, shape (n_examples + 1,), or None.
        position_ids: Positions, shape (1, n_tokens); without boundaries each 0 starts an example.
        sliding_window: Window size in tokens, or None.

    Returns:
        The output, shape (1, n_tokens, n_heads, width), and None instead of attention weights.

    Raises:
        ConfigError: The window is smaller than an example.
    """
    from xformers import ops
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    lengths = example_lengths(query, cu_seq_lens_q, position_ids)
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ConfigError(
            "params.yaml: sft.attn_implementation=xformers does not support sliding windows, but the model's "
            f"window is {sliding_window} tokens; set sdpa or flash_attention_2"
        )
    query, key, value = cast_to_value_dtype(query, *repeat_heads(query, key, value))
    output = ops.memory_efficient_attention(
        *(state.transpose(1, 2) for state in (query, key, value)),
        attn_bias=BlockDiagonalCausalMask.from_seqlens(lengths),
        p=dropout,
        scale=scaling,
    )
    return output, None


def attend_flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *more: Any,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run transformers' flex_attention, which accepts only states of one dtype."""
    found: tuple[torch.Tensor, torch.Tensor | None] = flex_attention_forward(
        module, *cast_to_value_dtype(query, key, value), *more, **rest
    )
    return found


def cast_to_value_dtype(*states: torch.Tensor) -> list[torch.Tensor]:
    """Cast all states to the dtype of the values, which are last.

    With full-precision weights, autocast gives half-precision values, but rotated queries and keys stay
    in full precision.
    """
    return [state.to(states[-1].dtype) for state in states]


def repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Repeat key and value heads to match the query heads."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def example_lengths(
    query: torch.Tensor, cu_seq_lens_q: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[int]:
    """Return the tokens of each example, from the boundaries or else the position_ids."""
    if cu_seq_lens_q is not None:
        lengths: list[int] = cu_seq_lens_q.diff().tolist()
        return lengths
    if position_ids is None:
        return [query.shape[2]]
    return lengths_from_positions(position_ids)


def lengths_from_positions(position_ids: torch.Tensor) -> list[int]:
    """Return the tokens of each example of a row in which each position 0 starts one.

    Example:
        >>> lengths_from_positions(torch.tensor([[0, 1, 2, 0, 1]]))
        [3, 2]
    """
    starts = (position_ids[0] == 0).nonzero().squeeze(-1).tolist()
    return [stop - start for start, stop in pairwise([*starts, position_ids.shape[1]])]


def boundaries(lengths: Sequence[int], device: torch.device | str) -> dict[str, torch.Tensor | int]:
    """Return the example boundaries of a row as TRL's collator passes them to a kernel.

    Args:
        lengths: Tokens of each example.
        device: Device of the boundaries.

    Example:
        >>> boundaries([3, 2], "cpu")["cu_seq_lens_q"]
        tensor([0, 3, 5], dtype=torch.int32)
    """
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


# torch.compile cannot trace a kernel in C.
untraced = torch.compiler.disable(attend_with_avx512)  # type: ignore[no-untyped-call]
AttentionInterface.register("avx512_per_example", untraced)
AttentionMaskInterface.register("avx512_per_example", sdpa_mask)
AttentionInterface.register("sdpa_per_example", attend_per_example)
AttentionMaskInterface.register("sdpa_per_example", sdpa_mask)
AttentionInterface.register("torch_varlen", attend_varlen)
AttentionInterface.register("xformers", attend_with_xformers)
AttentionInterface.register("flex_attention", attend_flex)
