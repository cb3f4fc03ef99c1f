"""Try an attention kernel on a small model: it has to run, forward and backward, and keep examples apart."""

from functools import cache
from itertools import accumulate

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tasks.sft.attention  # noqa: F401 - what sdpa stands for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Two examples in one row, and how far their logits may be from those of the examples alone: kernels add up in
# another order. What leaks from one example into the other is a hundred times as much.
LENGTHS = (24, 40)
TOLERANCE = {"bf16": 0.05, "fp16": 0.01, "tf32": 0.01, "fp32": 0.001}


@cache
def probe_attention(name: str, device: str, precision: str) -> str | None:
    """Return what is wrong with a kernel on this machine, or None.

    Args:
        name: Attention backend of transformers.
        device: cuda or cpu.
        precision: Arithmetic of the training.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    try:
        model = LlamaForCausalLM._from_config(
            config, attn_implementation=name, dtype=DTYPES.get(precision, torch.float32)
        ).to(device)
        first, second = (torch.randint(64, (1, n), device=device) for n in LENGTHS)
        both = torch.cat([first, second], 1)
        packed = model(both, **boundaries(device), use_cache=False).logits
        packed.float().sum().backward()
        alone = torch.cat([model(ids, use_cache=False).logits for ids in (first, second)], 1)
    # Kernels fail in their own ways: a missing package, a missing symbol, a device that is too old.
    except Exception as err:  # noqa: BLE001
        return f"{type(err).__name__}: {str(err).partition(chr(10))[0]}"
    difference = (packed - alone).abs().max().item()
    if difference > TOLERANCE[precision]:
        return f"packed examples see each other (logits differ by {difference:.3g})"
    return None


def boundaries(device: str) -> dict[str, torch.Tensor | int]:
    """Return what TRL's collator tells a kernel of the examples in a row: positions, and their ends."""
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    return {
        "position_ids": torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
