"""A small base for each chat template that TRL ships: a byte tokenizer with the template's tokens."""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

# What is written in angle or square brackets in a template and is no XML of its calls and reasoning.
TOKEN = re.compile(
    "<\\|[\\w.-]+\\|?>|<[\\w.-]+\\|>|<\uff5c[\\w\u2581]+\uff5c>|<(?:start|end)_of_turn>|\\[/?[A-Z_]+\\]|<sop>"
)


def make_tokenizer(source: str, *, adds_start: bool = False) -> Any:
    """Return a tokenizer of transformers with one token per byte, and those that the template writes.

    Args:
        source: Jinja source of the chat template.
        adds_start: Whether the tokenizer adds the start token to a text.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Phi-3 closes a conversation with the token that ends a text, and an answer with another one.
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>" if "<|end|>" in source else "</s>"}
    tokens = dict.fromkeys([*special.values(), *TOKEN.findall(source)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    if adds_start:
        start = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = source
    return made


def make_model(tokenizer: Any) -> Any:
    """Return a small random model for a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> Path:
    """Save a tokenizer as the base stage does."""
    tokenizer.save_pretrained(folder)
    return folder
