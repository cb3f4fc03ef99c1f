"""Convert a LLaMA-Factory config file: `nightshift import llamafactory.yaml`.

The datasets are those of dataset_info.json, in dataset_dir or next to the file.
"""

import re
from pathlib import Path
from typing import Any

from infra.importers import training_arguments as arguments
from infra.importers.argument_names import LLAMAFACTORY, TRAINING
from infra.importers.findings import (
    Config,
    Finding,
    Findings,
    convert_value,
    default,
    essential,
    mapped,
    not_needed,
    parse_bool,
    parse_float,
    parse_int,
    parse_nonzero,
    unmapped,
)
from infra.importers.hub import Lookup
from infra.importers.llamafactory.data import DATA_KEYS, map_data
from infra.importers.llamafactory.templates import SAME_TEXT
from infra.importers.sources import keep_test_share

NAMED = LLAMAFACTORY | TRAINING
MODEL_KEYS = ("model_name_or_path", "model_revision", "adapter_name_or_path")
METHOD_KEYS = (
    *("stage", "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_dora"),
    *("use_rslora", "loraplus_lr_ratio", "additional_target", "quantization_bit", "quantization_method"),
)
TEXT_KEYS = (
    *("template", "cutoff_len", "val_size", "packing", "neat_packing", "train_on_prompt", "default_system"),
    *("add_tokens", "add_special_tokens", "new_special_tokens"),
)
SPEED_KEYS = (
    *("flash_attn", "enable_liger_kernel", "disable_gradient_checkpointing", "pure_bf16"),
    *("gradient_checkpointing", "double_quantization", "upcast_layernorm"),
)
GROUPED = {*MODEL_KEYS, *DATA_KEYS, *METHOD_KEYS, *TEXT_KEYS, *SPEED_KEYS, *arguments.GROUPED}
KERNELS = {
    "auto": "auto",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
_MEDIA = "only text models are supported; nothing is lost if the rows have no images, videos or audio"
_OPTIMIZER = "only the optimizers of sft.optim are supported"
NOT_NEEDED = {
    "preprocessing_num_workers": "set by the stages",
    "preprocessing_batch_size": "set by the stages",
    "overwrite_cache": "DVC caches the tokenized data by content",
    "tokenized_path": "DVC caches the tokenized data by content",
    "plot_loss": "the report has charts",
    "image_*": _MEDIA,
    "video_*": _MEDIA,
    "audio_*": _MEDIA,
    "media_dir": _MEDIA,
    "freeze_vision_tower": _MEDIA,
    "freeze_multi_modal_projector": _MEDIA,
    "use_v1_kernels": "affects speed only",
    "use_unsloth*": "affects speed only",
    "use_fast_tokenizer": "the fast tokenizer is used",
    "cache_dir": "set HF_HOME in the environment",
    "ignore_pad_token_for_loss": "padding is never labelled",
    "include_effective_tokens_per_second": "always measured",
    "trust_remote_code": "remote code is never run; transformers has the model, or the stage base says so",
    "use_swanlab": "runs are logged to MLflow automatically",
    "swanlab_*": "runs are logged to MLflow automatically",
    "resize_vocab": "base.added_tokens resizes the vocabulary",
    "low_cpu_mem_usage": "set by the launcher",
    "mix_strategy": "rows of all sources are shuffled together; see `weight` of a source",
    "use_reentrant_gc": "the newer variant is used; it gives the same gradients",
    "tool_format": "the template writes tools",
}
REMEDIES = {
    "freeze_language_model": "train the language model, or nothing is trained",
    "use_galore": _OPTIMIZER,
    "galore_*": _OPTIMIZER,
    "use_apollo": _OPTIMIZER,
    "apollo_*": _OPTIMIZER,
    "use_badam": _OPTIMIZER,
    "badam_*": _OPTIMIZER,
    "use_adam_mini": _OPTIMIZER,
    "use_muon": _OPTIMIZER,
    "use_dft_loss": "only the loss of the next token is supported",
    "use_asft_loss": "only the loss of the next token is supported",
    "use_eaft_loss": "only the loss of the next token is supported",
    "pissa_*": "an adapter starts as zero; the trained function differs only in the start",
    "fp8*": "float8 training is not supported; set sft.precision: bf16 and, with LoRA, sft.fp8_base: true",
    "ray_*": "Ray is used only for dedupe; use sft.hostfile to train on several machines",
    "enable_thinking": "the template gets only messages and tools; set base.chat_template",
    "interleave_probs": "set `weight` of the sources in snapshot.sources",
    "streaming": "streaming is not supported: rows are read once and packed",
    "predict_with_generate": "set evaluate.exact_match to score answers",
    "do_predict": "set evaluate.exact_match to score answers",
}
NECESSARY = (
    *("pref_*", "reward_model*", "ref_model*", "use_dft_loss", "use_asft_loss", "use_eaft_loss", "streaming"),
    *("freeze_trainable_*", "use_llama_pro", "mixture_of_depths", "rope_scaling", "oft_*", "use_mca"),
    *(
        "shift_attn",
        "freeze_language_model",
        "enable_thinking",
        "kto_*",
        "dpo_*",
        "pissa_init",
        "use_hyper_parallel",
    ),
)


TOOL = arguments.Tool("LLaMA-Factory", NAMED, GROUPED, NOT_NEEDED, REMEDIES, NECESSARY)


def translate(config: Config, folder: Path, hub: Lookup) -> list[Finding]:
    """Return the findings for every key.

    Args:
        config: LLaMA-Factory config, key -> value.
        folder: Folder of the file.
        hub: Where commits are looked up.
    """

    def decide(given: Config) -> Findings:
        yield arguments.map_model(given, str(given.get("model_revision", "")), hub)
        yield from map_data(given, folder, hub)
        yield keep_test_share()
        yield from _method(given)
        yield from _text(given)
        yield from _speed(given)
        yield from arguments.map_arguments(given, folder)

    return arguments.translate(config, TOOL, decide)


def _method(config: Config) -> Findings:
    """Map what is trained: full fine-tuning, LoRA or QLoRA."""
    stage, target = str(config.get("stage", "pt")), "sft.adapter"
    if stage == "sft":
        yield not_needed("stage", "supervised fine-tuning")
    else:
        remedy = "train the rest with LLaMA-Factory"
        if stage in ("dpo", "kto"):
            remedy = (
                "preference tuning follows it: import the config of sft, set `preference: compare` of the "
                f"sources and prefer.method: {stage} (docs/training.md)"
            )
        yield essential("stage", f"{stage}: only sft is supported; {remedy}")
    if "adapter_name_or_path" in config:
        why = "make the adapter the champion (`nightshift adopt`), and set sft.start_from: champion"
        yield essential("adapter_name_or_path", why, "sft.start_from")
    kind, bits = str(config.get("finetuning_type", "lora")), config.get("quantization_bit")
    method = str(config.get("quantization_method", "bnb"))
    if kind not in ("full", "lora"):
        yield essential("finetuning_type", f"{kind}: set {target} to lora, qlora or null", target)
        return
    value = None if kind == "full" else ("qlora" if bits in (4, "4") else "lora")
    source = "finetuning_type" if "finetuning_type" in config else "quantization_bit"
    found = mapped(source, target, value) if source in config else default("finetuning_type", target, value)
    yield found
    yield from _quantization(config, bits, method, source)
    yield from _adapter(config, is_adapter=kind == "lora")


def _quantization(config: Config, bits: Any, method: str, source: str) -> Findings:
    if bits is not None and source != "quantization_bit":
        if bits in (4, "4"):
            yield not_needed("quantization_bit", "set by sft.adapter: qlora has a 4-bit base")
        elif bits in (8, "8"):
            note = "the frozen base keeps base.dtype: more precise than 8 bits, and twice the memory"
            yield mapped("quantization_bit", "sft.adapter", "lora", note)
        else:
            yield unmapped("quantization_bit", f"{bits}: only 4 bits are supported", "sft.adapter")
    if "quantization_method" in config:
        if method in ("bnb", "bitsandbytes"):
            yield not_needed("quantization_method", "bitsandbytes is used")
        else:
            yield unmapped("quantization_method", f"{method}: bitsandbytes is used", "sft.adapter")


def _adapter(config: Config, *, is_adapter: bool) -> Findings:
    """Map the hyperparameters of the adapter."""
    keys = METHOD_KEYS[2:10]
    yield default("lora_target", "sft.lora_layers_to_transform", None)
    yield default("finetuning_type", "sft.unfrozen_parameters", [])
    if not is_adapter:
        yield from (not_needed(key, "applies only with an adapter") for key in keys if key in config)
        yield from (
            default(key, f"sft.{key}", value)
            for key, value in (("use_dora", False), ("use_rslora", False), ("loraplus_lr_ratio", None))
        )
        yield from (
            default(key, f"sft.{key}", []) for key in ("lora_modules_to_save", "lora_target_parameters")
        )
        return
    rank = config.get("lora_rank", 8)
    alpha = config.get("lora_alpha", 2 * rank if isinstance(rank, int) else 16)
    for key, target, value, convert in (
        ("lora_rank", "sft.lora_r", rank, parse_int),
        ("lora_alpha", "sft.lora_alpha", alpha, parse_int),
        ("lora_dropout", "sft.lora_dropout", config.get("lora_dropout", 0.0), parse_float),
        ("use_dora", "sft.use_dora", config.get("use_dora", False), parse_bool),
        ("use_rslora", "sft.use_rslora", config.get("use_rslora", False), parse_bool),
        ("loraplus_lr_ratio", "sft.loraplus_lr_ratio", config.get("loraplus_lr_ratio", 0), parse_nonzero),
    ):
        found = convert_value(key, target, value, convert)
        yield found if key in config else default(key, target, found.value, "LLaMA-Factory's default")
    names = [part.strip() for part in str(config.get("lora_target", "all")).split(",")]
    target = "sft.lora_target_modules"
    value = "all-linear" if names == ["all"] else names
    yield (
        mapped("lora_target", target, value)
        if "lora_target" in config
        else default("lora_target", target, value, "LLaMA-Factory's default")
    )
    target = "sft.lora_modules_to_save"
    if "additional_target" in config:
        modules = [part.strip() for part in str(config["additional_target"]).split(",")]
        yield mapped("additional_target", target, modules)
    else:
        yield default("additional_target", target, [])
    yield default("lora_target", "sft.lora_target_parameters", [])


def _text(config: Config) -> Findings:
    """Map how rows become text and packed rows."""
    yield _template(config)
    cutoff = config.get("cutoff_len", 2048)
    found = convert_value("cutoff_len", "pack.max_length", cutoff, parse_int)
    yield found if "cutoff_len" in config else default("cutoff_len", "pack.max_length", 2048)
    yield default("cutoff_len", "pack.over_length", "truncate", "longer examples are cut off")
    share = config.get("val_size", 0.0)
    if isinstance(share, int | float) and 0 <= share < 1:
        found = mapped("val_size", "split.validation_share", float(share), "a share of the groups")
        if "val_size" in config:
            yield found
        elif "eval_dataset" not in config:
            yield default("val_size", "split.validation_share", 0.0)
    else:
        why = f"{share}: a number of rows; set split.validation_share to a share (0 to 1)"
        yield unmapped("val_size", why, "split.validation_share")
    yield from _packing(config)
    if "train_on_prompt" in config:
        why = "only answers are trained"
        is_on = config["train_on_prompt"]
        yield (
            essential("train_on_prompt", f"{why}; remove it") if is_on else not_needed("train_on_prompt", why)
        )
    if "default_system" in config:
        why = "add it to the rows as a system message"
        yield essential("default_system", why, "snapshot.sources")
    yield from _tokens(config)


def _packing(config: Config) -> Findings:
    keys = [key for key in ("packing", "neat_packing") if key in config]
    is_packed = any(config[key] is True for key in keys)
    note = "packed examples never attend to each other"
    if is_packed:
        first, *rest = [key for key in keys if config[key] is True]
        yield mapped(first, "pack.packing", value=True, note=note)
        yield from (not_needed(key, note) for key in rest)
        keys = [key for key in keys if config[key] is not True]
    else:
        yield default("packing", "pack.packing", value=False)
    yield from (not_needed(key, "off") for key in keys)


def _tokens(config: Config) -> Findings:
    keys = [key for key in ("add_tokens", "add_special_tokens", "new_special_tokens") if key in config]
    added = [part.strip() for key in keys for part in re.split(",", str(config[key])) if part.strip()]
    if keys:
        yield mapped(" and ".join(keys), "base.added_tokens", added)
    else:
        yield default("add_tokens", "base.added_tokens", [])
    yield default("special_tokens", "base.special_tokens", {})


def _template(config: Config) -> Finding:
    name, target = str(config.get("template", "")), "base.chat_template"
    if not name:
        return default("template", target, None, "that of the tokenizer")
    if name in SAME_TEXT:
        note = "" if SAME_TEXT[name] == name else "the same text for conversations without tools"
        return mapped("template", target, SAME_TEXT[name], note)
    why = (
        f"{name}: no template here has this text; set {target} to null if the tokenizer's own is meant, or "
        "to a file"
    )
    return essential("template", why, target)


def _speed(config: Config) -> Findings:
    """Map precision, kernels and activation checkpointing."""
    pure, keys = config.get("pure_bf16"), [key for key in arguments.PRECISION if key in config]
    if pure is True:
        note = "the weights are trained in bf16 with float32 copies; LLaMA-Factory keeps none"
        yield mapped("pure_bf16", "sft.precision", "bf16", note)
        yield from (not_needed(key, "pure_bf16 is on") for key in keys)
    else:
        yield from (not_needed("pure_bf16", "off") for _ in [pure] if pure is not None)
        yield from arguments.map_precision(config, "fp32")
    yield default("bf16", "base.dtype", "bfloat16", "the dtype in which the base is loaded")
    yield from _kernels(config)
    yield from _checkpointing(config)


def _kernels(config: Config) -> Findings:
    kernel, target = str(config.get("flash_attn", "auto")), "sft.attn_implementation"
    if kernel not in KERNELS:
        yield unmapped("flash_attn", f"{kernel} is unknown; set {target}", target)
    elif "flash_attn" in config:
        yield mapped("flash_attn", target, KERNELS[kernel])
    else:
        yield default("flash_attn", target, "auto")
    if (key := "enable_liger_kernel") in config:
        yield convert_value(key, "sft.use_liger_kernel", config[key], parse_bool)
    if "double_quantization" in config:
        yield not_needed("double_quantization", "qlora uses it")
    if "upcast_layernorm" in config:
        yield not_needed("upcast_layernorm", "norms are computed in float32")


def _checkpointing(config: Config) -> Findings:
    target = "sft.activation_checkpointing"
    keys = [key for key in ("disable_gradient_checkpointing", "gradient_checkpointing") if key in config]
    off = config.get("disable_gradient_checkpointing", config.get("gradient_checkpointing") is False)
    if keys:
        yield mapped(keys[0], target, not off)
        yield from (not_needed(key, f"see {keys[0]}") for key in keys[1:])
    else:
        note = "LLaMA-Factory's default is on"
        yield default("disable_gradient_checkpointing", target, value=True, note=note)
    yield default("use_reentrant_gc", "sft.use_reentrant", value=False, note="the same gradients")
