"""Map the training keys that are interpreted together, one function for each group."""

import re
from collections.abc import Generator
from typing import Any, get_args

from infra.importers.axolotl.keys import ADAPTER, DEFAULTS
from infra.importers.findings import (
    Config,
    Finding,
    Findings,
    contradiction,
    convert_value,
    default,
    essential,
    mapped,
    not_needed,
    parse_bool,
    parse_float,
    parse_int,
    parse_interval,
    parse_nonzero,
    share_of_steps,
    unmapped,
)
from nightshift.core.config import suggestion
from tasks.sft import Attention

BATCH_KEYS = ("gradient_accumulation_steps", "batch_size")
NOISE_KEYS = ("neftune_noise_alpha", "noisy_embedding_alpha")
HALF = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "float32": "fp32"}
PRECISION_KEYS = (*HALF, "tf32")
# Deprecated Axolotl flags -> attention kernel; of several, Axolotl uses the first.
ATTENTION_FLAGS = {
    "xformers_attention": "xformers",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
ATTENTION_KEYS = (*ATTENTION_FLAGS, "attn_implementation")
KERNELS: tuple[str, ...] = get_args(Attention)
CHECKPOINTING_KEYS = ("gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs")
ADAPTER_KEYS = (
    *("adapter", "load_in_4bit", "load_in_8bit", "lora_target_modules", "lora_target_linear"),
    *("lora_modules_to_save", "lora_target_parameters", "peft_layers_to_transform", *ADAPTER),
    "unfrozen_parameters",
)
EMBEDDINGS = re.compile(r"embed|lm_head|wte|wpe")
LIGER = "axolotl.integrations.liger.LigerPlugin"
# Flags of the Liger kernels that transformers applies.
LIGER_FLAGS = (
    *("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation", "liger_swiglu"),
    *("liger_cross_entropy", "liger_fused_linear_cross_entropy"),
)
PLUGIN_KEYS = ("plugins", *LIGER_FLAGS)
EVALUATION = ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy")
SAVING = ("save_steps", "saves_per_epoch", "save_strategy")
EVALUATION_KEYS = (
    *EVALUATION,
    *SAVING,
    *("metric_for_best_model", "greater_is_better", "torch_compile_backend"),
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
        why = f"{rows} is not a multiple of micro_batch_size={micro}; set {target}"
        yield unmapped("batch_size", why, target)
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
    is_half = (HALF[chosen] if chosen else "fp32" if "bf16" in config else "bf16") == "bf16"
    yield default(
        "bf16", "base.dtype", "bfloat16" if is_half else "float32", "the dtype in which the base is loaded"
    )
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
    if name in KERNELS:
        yield mapped("attn_implementation", target, name)
    elif name is not None:
        remedy = suggestion(str(name), list(KERNELS))
        why = f"{name} is not supported, nor are kernels of the Hub; {remedy}"
        yield unmapped("attn_implementation", why, target)
    elif on:
        note = f"deprecated; now attn_implementation: {ATTENTION_FLAGS[on[0]]}"
        yield mapped(on[0], target, ATTENTION_FLAGS[on[0]], note)
    for key in on if name is not None else on[1:]:
        yield not_needed(key, f"deprecated; {'attn_implementation' if name else on[0]} is used")
    if name is None and not on:
        yield default("attn_implementation", target, "auto", "the first kernel that works")


def map_checkpointing(config: Config) -> Findings:
    """Map activation checkpointing, which FSDP's options can also turn on."""
    target = "sft.activation_checkpointing"
    keys = [key for key in CHECKPOINTING_KEYS[:2] if key in config]
    values = [config[key] for key in keys]
    options = config.get("fsdp_config")
    options = options if isinstance(options, dict) else {}
    wrapped = any(options.get(f"{prefix}activation_checkpointing") for prefix in ("", "fsdp_"))
    if len({bool(value) for value in values}) > 1:
        yield contradiction(keys[0], keys[1], f"{values[0]} and {values[1]}; remove one")
        return
    for key in keys[1:]:
        yield not_needed(key, f"same as {keys[0]}")
    key, value = (keys[0], values[0]) if keys else ("gradient_checkpointing", None)
    if value in ("offload", "offload_disk", "unsloth"):
        yield mapped(key, target, value=True, note="recomputed; see below")
        why = f"{value}: activations are recomputed, not offloaded; reduce the batch size if needed"
        yield unmapped(key, why, target)
    elif wrapped and not value:
        yield mapped("fsdp_config.activation_checkpointing", target, value=True)
        yield from (not_needed(one, "FSDP's option turns it on") for one in keys[:1])
    elif value is None:
        yield default("gradient_checkpointing", target, value=False)
    else:
        yield convert_value(key, target, value, parse_bool)
    yield from _reentrant(config, is_on=bool(value or wrapped))


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
    kind, four_bits, target = config.get("adapter"), config.get("load_in_4bit"), "sft.adapter"
    if kind not in (None, "lora", "qlora"):
        yield essential("adapter", f"{kind} is not supported; set {target} to lora, qlora or null", target)
    elif kind == "qlora" and four_bits is False:
        why = "qlora needs a 4-bit base; choose lora, or load_in_4bit: true"
        yield contradiction("adapter", "load_in_4bit", why)
    elif kind is None and four_bits:
        why = "a 4-bit base can only be trained with an adapter; add one"
        yield contradiction("load_in_4bit", "adapter", why)
    elif kind is None and config.get("load_in_8bit"):
        why = "an 8-bit base can only be trained with an adapter; add one"
        yield contradiction("load_in_8bit", "adapter", why)
    elif kind is None:
        yield default("adapter", target, None, "not set: full fine-tuning")
    elif four_bits:
        yield mapped("adapter", target, "qlora", "load_in_4bit is on" if kind == "lora" else "")
    else:
        yield mapped("adapter", target, kind)
    if four_bits is not None and not (kind is None and four_bits) and not (kind == "qlora" and not four_bits):
        yield not_needed("load_in_4bit", "set by sft.adapter: qlora has a 4-bit base")
    yield from _eight_bits(config)
    yield from _adapter_numbers(config)
    yield from _modules(config)
    yield _layers(config)
    yield _unfrozen(config)


def _layers(config: Config) -> Finding:
    """Return the finding for the layers that get an adapter."""
    key, target = "peft_layers_to_transform", "sft.lora_layers_to_transform"
    layers = config.get(key)
    if layers is None or config.get("adapter") is None:
        note = "applies only with an adapter"
        return default(key, target, None) if layers is None else not_needed(key, note)
    layers = layers if isinstance(layers, list) else [layers]
    return convert_value(key, target, layers, lambda found: [parse_int(one) for one in found])


def _unfrozen(config: Config) -> Finding:
    """Return the finding for the patterns of the parameters that train; Axolotl escapes their dots."""
    key, target = "unfrozen_parameters", "sft.unfrozen_parameters"
    patterns = config.get(key)
    if not patterns:
        return default(key, target, [])
    if config.get("adapter") is not None:
        why = "beside an adapter, list modules in sft.lora_modules_to_save; set adapter, or remove it"
        return essential(key, why, target)
    patterns = patterns if isinstance(patterns, list) else [patterns]
    if parts := [one for one in patterns if re.search(r"\[\d*:\d*\]$", str(one))]:
        return essential(key, f"{parts[0]}: rows of a parameter cannot train alone; remove the range", target)
    return mapped(key, target, [re.sub(r"\.(?!\+)", r"\.", str(one)) for one in patterns])


def _eight_bits(config: Config) -> Findings:
    """Yield the finding for an 8-bit base: the same weights are trained on a base with more precision."""
    key = "load_in_8bit"
    if key not in config or (config[key] and config.get("adapter") is None):
        return
    if config[key] and config.get("adapter") == "qlora":
        yield contradiction("adapter", key, "qlora needs a 4-bit base; choose lora, or load_in_8bit: false")
    elif config[key]:
        note = "the frozen base keeps base.dtype: more precise than 8 bits, and twice the memory"
        yield mapped(key, "sft.adapter", config["adapter"], note)
    else:
        yield not_needed(key, "off")


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
        else:
            yield unmapped(key, f"not set, and Axolotl has no default; set {target}", target)


def _modules(config: Config) -> Findings:
    key, target = "lora_target_modules", "sft.lora_target_modules"
    names, is_linear = config.get(key), config.get("lora_target_linear")
    lists = ("lora_modules_to_save", "lora_target_parameters")
    if config.get("adapter") is None:
        ignored = [one for one in (key, "lora_target_linear", *lists) if one in config]
        yield from (not_needed(one, "applies only with an adapter") for one in ignored)
        yield from (default(one, f"sft.{one}", [], "applies only with an adapter") for one in lists)
        return
    if is_linear:
        yield mapped("lora_target_linear", target, "all-linear")
    elif is_linear is not None:
        yield not_needed("lora_target_linear", "off")
    if is_linear and names:
        yield _more_modules(names)
    elif isinstance(names, str) or (isinstance(names, list) and names):
        note = "a regular expression of whole module names" if isinstance(names, str) else ""
        yield mapped(key, target, names, note if names != "all-linear" else "")
    elif not is_linear:
        yield unmapped(key, f"not set, so PEFT chooses by model type; list them in {target}", target)
    for one in lists:
        values = config.get(one)
        if isinstance(values, list) and all(isinstance(name, str) for name in values):
            yield mapped(one, f"sft.{one}", values)
        elif values is None:
            yield default(one, f"sft.{one}", [])


def _more_modules(names: Any) -> Finding:
    """Return the finding for modules that are listed next to all linear layers."""
    key, target = "lora_target_modules", "sft.lora_target_modules"
    extra = [name for name in names if EMBEDDINGS.search(name)] if isinstance(names, list) else [names]
    if not extra:
        return not_needed(key, "all-linear includes them")
    return unmapped(key, f"{', '.join(map(str, extra))}: not linear layers of a block; remove them", target)


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
    for key, other in (("eval_steps", "evals_per_epoch"), ("save_steps", "saves_per_epoch")):
        if config.get(key) and config.get(other):
            yield contradiction(key, other, f"{config[key]} and {config[other]}; remove one")
            return
    evaluation = yield from _evaluation(config)
    yield from _saving(config, evaluation)
    yield from _best(config)


def _evaluation(config: Config) -> Generator[Finding, None, int | float | None]:
    """Yield the findings of the evaluation; return its interval."""
    target = "sft.eval_steps"
    keys = [key for key in EVALUATION if key in config]
    strategy = next((config[key] for key in EVALUATION[2:] if config.get(key) is not None), None)
    # YAML parses a bare `no` as false.
    is_off = strategy in (False, "no")
    if is_off and config.get("eval_steps"):
        key = next(key for key in EVALUATION[2:] if key in config)
        yield contradiction(key, "eval_steps", f"{key} is no, but eval_steps is {config['eval_steps']}")
        return None
    if not config.get("val_set_size") and "test_datasets" not in config:
        if "val_set_size" in config and (config.get("eval_steps") or not (strategy is None or is_off)):
            given = "eval_steps" if config.get("eval_steps") else keys[-1]
            yield contradiction("val_set_size", given, "no rows are held out to evaluate on; remove one")
            return None
        yield default("eval_steps", target, None, "val_set_size is 0: there is nothing to evaluate on")
        yield from (not_needed(key, "val_set_size is 0: there is nothing to evaluate on") for key in keys)
        return None
    found = _interval(config, "eval_steps", "evals_per_epoch", target)
    if found is None and strategy == "epoch":
        found = _each_epoch(config, keys[-1], target)
    if found is None:
        found = default("eval_steps", target, None, "no evaluation during training")
    yield found
    yield from (_repeats(key, strategy, found) for key in keys if key not in found.key.split(" and "))
    return found.value if found.kind == "mapped" else None


def _interval(config: Config, key: str, other: str, target: str) -> Finding | None:
    """Return the finding of an interval in steps or per epoch, or None if there is none."""
    if config.get(key):
        return convert_value(key, target, config[key], parse_interval)
    if not config.get(other):
        return None
    try:
        share = share_of_steps(config[other], config.get("num_epochs", 1))
    except ValueError as err:
        return unmapped(other, str(err), target)
    return mapped(other, target, share, f"{config[other]} per epoch, as a share of all steps")


def _each_epoch(config: Config, key: str, target: str) -> Finding:
    if "max_steps" in config:
        why = f"epoch: with max_steps, the number of epochs is not known; set {target}"
        return unmapped(key, why, target)
    share = share_of_steps(1, config.get("num_epochs", 1))
    return mapped(key, target, share, "once per epoch, as a share of all steps")


def _repeats(key: str, strategy: Any, found: Finding) -> Finding:
    """Return the finding for a key that repeats another one."""
    if key in EVALUATION[2:] and strategy not in (None, False, "no", "steps", "epoch"):
        return unmapped(key, f"{strategy}: is unknown; set sft.eval_steps", "sft.eval_steps")
    return not_needed(key, f"sft.eval_steps: {'never' if found.value is None else found.key}")


def _saving(config: Config, evaluation: int | float | None) -> Findings:
    """Yield the findings of the checkpoints, which do not change what is trained."""
    target, keys = "sft.save_steps", [key for key in SAVING if key in config]
    strategy = config.get("save_strategy")
    if config.get("load_best_model_at_end") and evaluation is not None:
        note = "a checkpoint at each evaluation, so that the best model is one of them"
        yield default("save_steps", target, evaluation, note)
        yield from (not_needed(key, note) for key in keys)
        return
    found = _interval(config, "save_steps", "saves_per_epoch", target)
    if found and (found.value is not None or found.kind == "unmapped"):
        yield found
        keys.remove(found.key)
    for key in keys:
        if key == "save_strategy" and strategy not in (False, "no", "steps", "epoch", "best"):
            yield unmapped(key, f"{strategy}: is unknown; set {target}", target)
        else:
            yield not_needed(key, "the result is always saved; checkpoints are only for resuming")


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
