"""torch's attention on a processor, one packed example after the other.

For a packed row transformers hands torch one mask for all of it, and the kernel computes, for every pair of
tokens of different examples, what the mask then hides: half of a step with rows of 1024 tokens.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


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


AttentionInterface.register("sdpa", attend_by_example)
