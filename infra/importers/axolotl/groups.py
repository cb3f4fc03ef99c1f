"""Map the training keys that are interpreted together, one function for each group."""

import re
from typing import Any, get_args

from infra.importers.axolotl.findings import (
    AFTER_PACKING,
    Config,
    Findings,
    contradiction,
    convert_value,
    default,
    mapped,
    not_needed,
    parse_bool,
    parse_float,
    parse_int,
    parse_nonzero,
    parse_steps,
    unmapped,
)
from infra.importers.axolotl.keys import ADAPTER, DEFAULTS, UNMAPPED
from nightshift.core.config import suggestion
from tasks.sft import Attention

BATCH_KEYS = ("gradient_accumulation_steps", "batch_size")
NOISE_KEYS = ("neftune_noise_alpha", "noisy_embedding_alpha")
HALF = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "float32": "fp32"}
PRECISION_KEYS = (*HALF, "tf32")
# Deprecated Axolotl flags -> attention kernel.
ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "xformers_attention": "xformers",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
ATTENTION_KEYS = (*ATTENTION_FLAGS, "attn_implementation")
KERNELS: tuple[str, ...] = get_args(Attention)
CHECKPOINTING_KEYS = ("gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs")
ADAPTER_KEYS = ("adapter", "load_in_4bit", "lora_target_modules", "lora_target_linear", *ADAPTER)
EMBEDDINGS = re.compile(r"embed|lm_head|wte|wpe")
LIGER = "axolotl.integrations.liger.LigerPlugin"
# Flags of the Liger kernels that transformers applies.
LIGER_FLAGS = (
    *("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation", "liger_swiglu"),
    *("liger_cross_entropy", "liger_fused_linear_cross_entropy"),
)
PLUGIN_KEYS = ("plugins", *LIGER_FLAGS)
EVALUATION_KEYS = (
    *("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy", "save_steps"),
    *(
        "saves_per_epoch",
        "save_strategy",
        "metric_for_best_model",
        "greater_is_better",
        "torch_compile_backend",
    ),
)


def map_batches(config: Config) -> Findings:
    """Map rows per optimizer step: the old `batch_size` is micro-batch size times accumulation steps."""
    key, target = "gradient_accumulation_steps", "sft.gradient_accumulation_steps"
    rows, micro = config.get("batch_size"), config.get("micro_batch_size", 1)
    if key in config:
        yield convert_value(key, target, config[key], parse_int)
    elif rows is None:
        yield default(key, target, 1)
    if rows is None:
        return
    try:
        is_multiple = parse_int(rows) % parse_int(micro) == 0
    except (ValueError, ZeroDivisionError):
        is_multiple = False
    if not is_multiple:
        yield unmapped("batch_size", f"{rows} is not a multiple of micro_batch_size={micro}; set {target}")
    elif key not in config:
        yield mapped(
            "batch_size", target, parse_int(rows) // parse_int(micro), "batch_size / micro_batch_size"
        )
    elif parse_int(rows) == parse_int(micro) * parse_float(config[key]):
        yield not_needed("batch_size", f"micro_batch_size x {key}")
    else:
        yield contradiction("batch_size", key, f"{rows} is not {micro} x {config[key]}; remove batch_size")


def map_noise(config: Config) -> Findings:
    """Map the NEFTune noise, under its current and its deprecated name."""
    new, old = NOISE_KEYS
    target = "sft.neftune_noise_alpha"
    if new in config and old in config and config[new] != config[old]:
        yield contradiction(new, old, f"{config[new]} and {config[old]}; remove {old}")
    elif new in config:
        yield convert_value(new, target, config[new], parse_nonzero)
        if old in config:
            yield not_needed(old, f"same as {new}")
    elif old in config:
        yield convert_value(old, target, config[old], parse_nonzero, f"deprecated name of {new}")
    else:
        yield default(new, target, None)


def map_precision(config: Config) -> Findings:
    """Map Axolotl's six precision switches to one of five values."""
    target = "sft.precision"
    on = [key for key in HALF if config.get(key) in (True, "auto", "full")]
    odd = [key for key in HALF if key not in on and config.get(key, False) is not False]
    yield from (unmapped(key, f"{config[key]} is unknown; set sft.precision") for key in odd)
    for key in on[1:]:
        if HALF[key] != HALF[on[0]]:
            yield contradiction(on[0], key, "choose one precision")
            return
    for key in HALF:
        if key in config and key not in odd and key not in on[:1]:
            yield not_needed(key, "off" if key not in on else f"same as {on[0]}")
    chosen = on[0] if on else ""
    notes = {
        "bfloat16": "mixed precision: without ZeRO, trainable weights stay in float32",
        "float16": "mixed precision: without ZeRO, trainable weights stay in float32",
        "fp16": "not needed on a GPU with bf16; Axolotl's default is auto",
    }
    if chosen == "bf16" and config["bf16"] == "auto":
        yield mapped("bf16", target, "auto", "fp32 if bf16 is not supported, where Axolotl uses fp16")
    elif chosen:
        yield mapped(chosen, target, HALF[chosen], notes.get(chosen, ""))
    elif "bf16" not in config:
        yield default("bf16", target, "auto")
    elif config.get("tf32"):
        yield mapped("tf32", target, "tf32")
        return
    else:
        yield mapped("bf16", target, "fp32", "no half precision is enabled")
    if "tf32" in config:
        why = "sft.precision sets one precision; matmuls that stay in float32 do not use tf32"
        yield not_needed("tf32", why if config["tf32"] else "off")


def map_attention(config: Config) -> Findings:
    """Map the attention kernel: one name, or one of five deprecated flags."""
    target, name = "sft.attn_implementation", config.get("attn_implementation")
    on = [key for key in ATTENTION_FLAGS if config.get(key)]
    yield from (not_needed(key, "off") for key in ATTENTION_FLAGS if key in config and key not in on)
    if len(on) > 1:
        yield contradiction(on[0], on[1], "choose one kernel, with attn_implementation")
    elif on and name not in (None, ATTENTION_FLAGS[on[0]]):
        yield contradiction(on[0], "attn_implementation", f"{name} is another kernel; remove {on[0]}")
    elif name in KERNELS:
        yield mapped("attn_implementation", target, name)
        yield from (not_needed(key, "deprecated; same as attn_implementation") for key in on)
    elif name is not None:
        remedy = suggestion(str(name), list(KERNELS))
        yield unmapped(
            "attn_implementation", f"{name} is not supported, nor are kernels of the Hub; {remedy}"
        )
    elif on:
        note = f"deprecated; now attn_implementation: {ATTENTION_FLAGS[on[0]]}"
        yield mapped(on[0], target, ATTENTION_FLAGS[on[0]], note)
    else:
        yield default("attn_implementation", target, "auto", "the first kernel that works")


def map_checkpointing(config: Config) -> Findings:
    """Map activation checkpointing."""
    new, old = config.get("activation_checkpointing"), config.get("gradient_checkpointing")
    key = "gradient_checkpointing" if old is not None else "activation_checkpointing"
    value = old if old is not None else new
    target = "sft.activation_checkpointing"
    if old is not None and new is not None and bool(old) != bool(new):
        yield contradiction("gradient_checkpointing", "activation_checkpointing", f"{old} and {new}")
        return
    if old is not None and new is not None:
        yield not_needed("activation_checkpointing", "same as gradient_checkpointing")
    if value in ("offload", "offload_disk", "unsloth"):
        yield mapped(key, target, value=True, note="recomputed; see below")
        yield unmapped(
            key, f"{value}: activations are recomputed, not offloaded; reduce the batch size if needed"
        )
    elif value is None:
        yield default("gradient_checkpointing", target, value=False)
    else:
        yield convert_value(key, target, value, parse_bool)
    yield from _reentrant(config, is_on=bool(value))


def _reentrant(config: Config, *, is_on: bool) -> Findings:
    options = config.get("gradient_checkpointing_kwargs")
    options = options if isinstance(options, dict) else {}
    key, target = "gradient_checkpointing_kwargs.use_reentrant", "sft.use_reentrant"
    requested = options.get("use_reentrant")
    if requested is None or not is_on:
        yield default(key, target, value=False, note="same gradients, PyTorch's newer variant")
        if requested is not None:
            yield not_needed(key, "gradient_checkpointing is off")
    elif requested and config.get("adapter"):
        yield mapped(
            key, target, value=False, note="same gradients; with an adapter, the older variant may give none"
        )
    else:
        yield convert_value(key, target, requested, parse_bool)
    for name in (name for name in options if name != "use_reentrant"):
        yield unmapped(f"gradient_checkpointing_kwargs.{name}", "PyTorch's default is used; remove it")


def map_adapter(config: Config) -> Findings:
    """Map LoRA, QLoRA or full fine-tuning, and the hyperparameters of the adapter."""
    kind, four_bits = config.get("adapter"), config.get("load_in_4bit")
    if kind not in (None, "lora", "qlora"):
        yield unmapped("adapter", f"{kind} is not supported; set sft.adapter to lora, qlora or null")
    elif kind == "qlora" and four_bits is False:
        yield contradiction(
            "adapter", "load_in_4bit", "qlora needs a 4-bit base; choose lora, or load_in_4bit: true"
        )
    elif kind is None and four_bits:
        yield contradiction(
            "load_in_4bit", "adapter", "a 4-bit base can only be trained with an adapter; add one"
        )
    elif kind is None:
        yield default("adapter", "sft.adapter", None, "not set: full fine-tuning")
    elif four_bits:
        yield mapped("adapter", "sft.adapter", "qlora", "load_in_4bit is on" if kind == "lora" else "")
    else:
        yield mapped("adapter", "sft.adapter", kind)
    if four_bits is not None and not (kind is None and four_bits) and not (kind == "qlora" and not four_bits):
        yield not_needed("load_in_4bit", "set by sft.adapter: qlora has a 4-bit base")
    yield from _adapter_numbers(config)
    yield from _modules(config)


def _adapter_numbers(config: Config) -> Findings:
    for key, (target, convert) in ADAPTER.items():
        if config.get("adapter") is None:
            if key in config:
                yield not_needed(key, "applies only with an adapter")
            if isinstance(DEFAULTS.get(key, ""), bool | None):
                yield default(key, target, DEFAULTS[key], "applies only with an adapter")
        elif key in config:
            yield convert_value(key, target, config[key], convert)
        elif key in DEFAULTS:
            yield default(key, target, DEFAULTS[key])


def _modules(config: Config) -> Findings:
    key, target = "lora_target_modules", "sft.lora_target_modules"
    names, is_linear = config.get(key), config.get("lora_target_linear")
    if config.get("adapter") is None:
        yield from (
            not_needed(k, "applies only with an adapter") for k in (key, "lora_target_linear") if k in config
        )
        return
    if is_linear:
        yield mapped("lora_target_linear", target, "all-linear")
    elif is_linear is not None:
        yield not_needed("lora_target_linear", "off")
    if is_linear and names:
        extra = [name for name in names if EMBEDDINGS.search(name)] if isinstance(names, list) else [names]
        if extra:
            yield unmapped(key, f"{', '.join(map(str, extra))}: not linear layers of a block; remove them")
        else:
            yield not_needed(key, "all-linear includes them")
    elif names == "all-linear" or (isinstance(names, list) and names):
        yield mapped(key, target, names)
    elif names:
        yield unmapped(key, f"{names!r} is a pattern; list the modules, or set all-linear, in {target}")
    elif not is_linear:
        yield unmapped(key, f"not set, so PEFT chooses by model type; list them in {target}")


def map_plugins(config: Config) -> Findings:
    """Map Liger's kernels; other plugins have no counterpart."""
    names = config.get("plugins") or []
    names = names if isinstance(names, list) else [names]
    is_liger = any("liger" in str(name).lower() for name in names)
    if is_liger:
        yield mapped("plugins", "sft.use_liger_kernel", value=True, note=LIGER)
    else:
        yield default("plugins", "sft.use_liger_kernel", value=False)
    for name in (str(name) for name in names if "liger" not in str(name).lower()):
        why = "Axolotl plugins are not supported"
        remedy = "set sft.use_liger_kernel" if "cut_cross_entropy" in name else "remove it"
        yield unmapped("plugins", f"{name}: {why}; {remedy}")
    for key in (key for key in LIGER_FLAGS if key in config):
        if not is_liger:
            yield not_needed(key, "Axolotl reads it only with its Liger plugin")
        elif config[key] or key == "liger_cross_entropy":
            yield not_needed(key, "sft.use_liger_kernel enables all kernels of the model")
        else:
            yield unmapped(
                key, "Liger's kernels are all on or all off; set sft.use_liger_kernel: false to disable them"
            )


def map_evaluation(config: Config) -> Findings:
    """Map when the model is evaluated and saved."""
    for key, other, target in (
        ("eval_steps", "evals_per_epoch", "sft.eval_steps"),
        ("save_steps", "saves_per_epoch", "sft.save_steps"),
    ):
        if config.get(key) and config.get(other):
            yield contradiction(key, other, f"{config[key]} and {config[other]}; remove one")
        elif key in config:
            yield convert_value(
                key, target, config[key], parse_nonzero_steps if key == "eval_steps" else parse_steps
            )
            if other in config:
                yield not_needed(other, f"set by {key}")
        elif config.get(other) == 0 and key == "eval_steps":
            yield mapped(other, target, None, "no evaluation during training")
        elif other in config:
            yield unmapped(other, UNMAPPED[other])
    for key in ("eval_strategy", "evaluation_strategy"):
        yield from _strategy(config, key, "eval_steps")
    yield from _strategy(config, "save_strategy", "save_steps")
    yield from _best(config)


def parse_nonzero_steps(value: Any) -> int | None:
    """Parse a number of steps; 0 (never) becomes None.

    Raises:
        ValueError: The value is a share of all steps, or not a number.
    """
    return parse_steps(value) or None


def _strategy(config: Config, key: str, number_key: str) -> Findings:
    value = config.get(key)
    if value is None:
        return
    # YAML parses a bare `no` as false.
    is_off = value in (False, "no")
    if is_off and config.get(number_key):
        yield contradiction(key, number_key, f"{key} is no, but {number_key} is {config[number_key]}")
    elif is_off and number_key == "eval_steps":
        yield mapped(key, "sft.eval_steps", None, "no evaluation during training")
    elif value == "steps":
        yield not_needed(key, f"set by {number_key}")
    elif is_off:
        yield unmapped(
            key, "checkpoints are always saved, to resume a killed training run; raise sft.save_steps"
        )
    elif value == "best":
        yield unmapped(
            key, "set sft.load_best_model_at_end; the best checkpoint is kept in addition to the last ones"
        )
    else:
        yield unmapped(key, f"{value}: set sft.{number_key}; {AFTER_PACKING}")


def _best(config: Config) -> Findings:
    metric, greater = config.get("metric_for_best_model"), config.get("greater_is_better")
    if metric is not None:
        known = metric in ("loss", "eval_loss")
        why = (
            "the validation loss per token is used"
            if known
            else f"{metric} is not supported; the loss is used"
        )
        yield (not_needed if known else unmapped)(
            "metric_for_best_model", why + ("" if known else "; remove it")
        )
    if greater is not None:
        why = "a lower loss is better"
        yield (
            unmapped("greater_is_better", f"{why}; remove it")
            if greater
            else not_needed("greater_is_better", why)
        )
    backend = config.get("torch_compile_backend")
    if backend is not None:
        known = backend == "inductor"
        yield (not_needed if known else unmapped)(
            "torch_compile_backend", "inductor is used; remove any other"
        )
