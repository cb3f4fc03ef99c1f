"""Small random models of many architectures, with a tokenizer of one token per byte."""

from pathlib import Path
from typing import Any

from nightshift.core.files import read_json, write_json
from tests.helpers.byte_base import make_byte_base

VOCABULARY = 264
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 257,
    # Large enough for attention to matter.
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Architecture -> model type of transformers, and what differs from `SIZES`.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "olmo2": ("olmo2", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "tie_word_embeddings": True, **WINDOW}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi3": ("phi3", {}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "cohere": ("cohere", {"tie_word_embeddings": True, "logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 2.0}),
    "stablelm": ("stablelm", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True}),
    "opt": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True, "dropout": 0.0},
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "mamba": ("mamba", {"state_size": 4, "tie_word_embeddings": True}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "lru_width": 32,
            "attention_window_size": 8,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": ("gemma2", {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 8}),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None, **WINDOW},
    ),
    "gemma3": ("gemma3", {}),
    "mistral3": ("mistral3", {}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "falcon_h1": ("falcon_h1", {"head_dim": 8, **MAMBA}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "head_dim": 8,
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


def make_architecture(name: str, folder: Path) -> Path:
    """Write a random model of an architecture and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if name == "mistral3" else AutoModelForCausalLM
    model = kind.from_config(make_config(name), dtype=torch.float32)
    make_byte_base(folder)
    # Otherwise transformers would rebuild the tokenizer as that of the model type.
    config = folder / "tokenizer_config.json"
    write_json(config, read_json(config) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    model.save_pretrained(folder)
    return folder


def make_config(name: str) -> Any:
    """Build the config of a small model."""
    from transformers import AutoConfig

    kind, changes = ARCHITECTURES[name]
    sizes = {**SIZES, **changes}
    if kind == "gemma3":
        text = {"model_type": "gemma3_text", **sizes, "head_dim": 8, **WINDOW}
        return AutoConfig.for_model(
            kind,
            text_config=text,
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            tie_word_embeddings=True,
        )
    if kind == "mistral3":
        text = {"model_type": "mistral", **sizes}
        return AutoConfig.for_model(kind, text_config=text, vision_config={**VISION, "model_type": "pixtral"})
    return AutoConfig.for_model(kind, **sizes)
