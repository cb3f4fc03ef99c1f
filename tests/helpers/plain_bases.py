"""Small base models without a chat template, of the architectures that imported examples train."""

from pathlib import Path
from typing import Any

BEGIN, END = "<|im_start|>", "<|endoftext|>"


def make_base(kind: str, tokenizer: Any, folder: Path) -> Path:
    """Create a random base.

    Args:
        kind: phi, whose tokenizer adds no token; or llama, whose tokenizer begins each text with one.
        tokenizer: Tokenizer of the demo's base.
        folder: Folder to create.
    """
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.convert_tokens_to_ids(BEGIN),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**sizes)) if kind == "phi" else LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.bos_token, tokenizer.eos_token = BEGIN, END
    if kind == "llama":
        begin = (BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[begin]
        )
    tokenizer.save_pretrained(folder)
    return folder
