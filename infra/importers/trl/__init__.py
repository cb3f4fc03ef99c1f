"""Convert a config file of TRL's `trl sft`: `nightshift import trl-sft.yaml`."""

from pathlib import Path
from typing import Any

from infra.importers import training_arguments as arguments
from infra.importers.argument_names import TRAINING, TRL
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
    unmapped,
)
from infra.importers.hub import Lookup
from infra.importers.sources import (
    Dataset,
    explain_missing_commit,
    find_sources,
    keep_test_share,
    replace_sources,
)
from nightshift.core.errors import DataError
from tasks.sft import Attention

NAMED = TRL | TRAINING
MODEL_KEYS = ("model_name_or_path", "model_revision", "dtype", "torch_dtype")
DATA_KEYS = (
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
    *("dataset_text_field", "datasets"),
)
TEXT_KEYS = (
    *("chat_template_path", "eos_token", "pad_token", "max_length", "max_seq_length", "truncation_mode"),
    *("packing", "packing_strategy", "padding_free", "eval_packing", "completion_only_loss"),
    *("assistant_only_loss", "loss_type", "shuffle_dataset"),
)
ADAPTER_KEYS = (
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
    *("lora_target_parameters", "use_dora", "use_rslora", "load_in_4bit", "load_in_8bit", "lora_task_type"),
)
SPEED_KEYS = ("attn_implementation", "gradient_checkpointing", "activation_checkpointing")
GROUPED = {*MODEL_KEYS, *DATA_KEYS, *TEXT_KEYS, *ADAPTER_KEYS, *SPEED_KEYS, *arguments.GROUPED}
DEFAULTS: dict[str, Any] = arguments.DEFAULTS | {"learning_rate": 2e-5}
ADAPTER: dict[str, tuple[Any, arguments.Convert]] = {
    "lora_r": (16, parse_int),
    "lora_alpha": (32, parse_int),
    "lora_dropout": (0.05, parse_float),
    "use_dora": (False, parse_bool),
    "use_rslora": (False, parse_bool),
}
NOT_NEEDED = {
    "dataset_num_proc": "set by the stages",
    "pad_to_multiple_of": "padding is never labelled",
    "env": "set the variables in the environment",
    "use_bnb_nested_quant": "qlora uses double quantization",
    "ignore_bias_buffers": "set by the launcher",
    "trust_remote_code": "remote code is never run; transformers has the model, or the stage base says so",
    "bnb_4bit_quant_storage": "set by sft.strategy",
}
REMEDIES = {
    "activation_offloading": "activations stay on the device; set sft.activation_checkpointing",
    "dataset_kwargs": "rows are always checked and tokenized; remove it",
    "model_init_kwargs": "the base is loaded unchanged; make the change in a local copy and set base.model",
    "router_aux_loss_coef": "the loss of the router is that of the base's config; set it there",
    "bnb_4bit_quant_type": "qlora uses NF4; remove it",
}
NECESSARY = ("model_init_kwargs", "dataset_kwargs", "router_aux_loss_coef")


TOOL = arguments.Tool("TRL", NAMED, GROUPED, NOT_NEEDED, REMEDIES, NECESSARY)


def translate(config: Config, folder: Path, hub: Lookup) -> list[Finding]:
    """Return the findings for every key.

    Args:
        config: TRL config, key -> value.
        folder: Folder of the file.
        hub: Where commits are looked up.
    """

    def decide(given: Config) -> Findings:
        # TRL's default is the branch main.
        revision = str(given.get("model_revision", ""))
        yield arguments.map_model(given, "" if revision == "main" else revision, hub)
        yield from _data(given, hub)
        yield keep_test_share()
        yield from _text(given)
        yield from _adapter(given)
        yield default("lora_target_modules", "sft.lora_layers_to_transform", None)
        yield default("use_peft", "sft.unfrozen_parameters", [])
        yield from _speed(given)
        yield from arguments.map_arguments(given, folder, DEFAULTS)

    return arguments.translate(config, TOOL, decide)


def _data(config: Config, hub: Lookup) -> Findings:
    """Map the dataset, or the mixture of datasets."""
    rows = config.get("datasets")
    key = "datasets" if rows else "dataset_name"
    if not rows:
        rows = [{"path": config.get("dataset_name", ""), "name": config.get("dataset_config", "")}]
    sources: list[dict[str, Any]] = []
    notes = []
    for place, row in enumerate(rows if isinstance(rows, list) else [rows]):
        where = f"datasets[{place}]" if key == "datasets" else key
        try:
            found, note = find_sources(_dataset(row, config), hub)
        except (ValueError, DataError) as err:
            why = explain_missing_commit(str(config.get("dataset_name", "")), err)
            yield essential(where, why, "snapshot.sources")
            continue
        sources += found
        notes.append(note)
    yield from replace_sources(key, sources, notes=notes)
    for one, why in (
        ("dataset_config", "the folder of the source"),
        ("dataset_train_split", "the split of the source"),
        ("dataset_streaming", "rows are read once and packed"),
        ("dataset_text_field", "the column of the source"),
    ):
        if one in config:
            yield not_needed(one, why)
    yield from _validation(config)


def _dataset(row: Any, config: Config) -> Dataset:
    """Return a dataset of the config.

    Raises:
        ValueError: It has an unexpected form.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{row!r}: must be a mapping with `path`; correct it")
    if unknown := sorted(row.keys() - {"path", "name", "data_files", "split", "columns", "data_dir"}):
        raise ValueError(f"{', '.join(map(str, unknown))}: unknown; remove it")
    if row.get("columns") or row.get("data_dir"):
        raise ValueError("columns and data_dir are not supported; list the files in snapshot.sources")
    column = str(config.get("dataset_text_field", "text"))
    files = row.get("data_files") or []
    return Dataset(
        path=str(row.get("path", "")),
        name=str(row.get("name") or ""),
        split=str(row.get("split") or config.get("dataset_train_split", "train")),
        files=tuple(str(file) for file in (files if isinstance(files, list) else [files])),
        options={} if column == "text" else {"columns": {"text": column}},
    )


def _validation(config: Config) -> Findings:
    """Map the validation set: TRL evaluates on another split, and holds out nothing itself."""
    key, target = "dataset_test_split", "split.validation_share"
    strategy = str(config.get("eval_strategy", config.get("evaluation_strategy", "no"))).lower()
    if strategy == "no":
        yield default(key, target, 0.0, "no evaluation during training")
        if key in config:
            yield not_needed(key, "no evaluation during training")
    else:
        why = "the test split is not read: a share of the groups is held out; set split.validation_share"
        yield default(key, target, 0.05, "an evaluation needs held-out rows")
        yield unmapped(key, why, target)


def _text(config: Config) -> Findings:
    """Map how rows become text and packed rows."""
    target = "base.chat_template"
    path = config.get("chat_template_path")
    if path is None:
        yield default("chat_template_path", target, None, "that of the tokenizer")
    elif Path(str(path)).is_file():
        yield mapped("chat_template_path", target, str(path))
    else:
        why = f"{path}: no such file; save the template in a file, and set {target} to its path"
        yield essential("chat_template_path", why, target)
    if "eos_token" in config:
        yield mapped("eos_token", "base.special_tokens", {"eos_token": str(config["eos_token"])})
    else:
        yield default("eos_token", "base.special_tokens", {})
    yield default("added_tokens", "base.added_tokens", [])
    if "pad_token" in config:
        yield not_needed("pad_token", "padding is never labelled")
    yield from _length(config)
    yield from _packing(config)
    yield from _loss(config)


def _length(config: Config) -> Findings:
    keys = [key for key in ("max_length", "max_seq_length") if key in config]
    target, key = "pack.max_length", keys[0] if keys else "max_length"
    found = convert_value(key, target, config.get(key, 1024), parse_int)
    yield found if keys else default(key, target, 1024, "TRL's default")
    yield from (not_needed(one, f"same as {key}") for one in keys[1:] if config[one] == config[key])
    if len(keys) > 1 and config[keys[0]] != config[keys[1]]:
        yield contradiction(keys[0], keys[1], "two lengths; remove one")
    mode = str(config.get("truncation_mode", "keep_start"))
    if mode == "keep_start":
        yield default("truncation_mode", "pack.over_length", "truncate", "longer examples are cut off")
        if "truncation_mode" in config:
            yield not_needed("truncation_mode", "the end of longer examples is cut off")
    else:
        yield unmapped("truncation_mode", f"{mode}: set pack.over_length", "pack.over_length")


def _packing(config: Config) -> Findings:
    for key, target in (("packing", "pack.packing"), ("eval_packing", "sft.eval_packing")):
        if key in config:
            yield convert_value(key, target, config[key], parse_bool)
        elif key == "packing":
            yield default(key, target, value=False, note="TRL's default")
    if "packing_strategy" in config:
        if config["packing_strategy"] in ("bfd", "bfd_split"):
            yield not_needed("packing_strategy", "examples are placed whole, and kept apart")
        else:
            why = f"{config['packing_strategy']}: examples are placed whole; set pack.over_length"
            yield unmapped("packing_strategy", why, "pack.over_length")
    if "padding_free" in config:
        yield not_needed("padding_free", "always")
    if "shuffle_dataset" in config:
        yield not_needed("shuffle_dataset", "rows are always shuffled with sft.seed")


def _loss(config: Config) -> Findings:
    """Map which tokens are trained."""
    key = "assistant_only_loss"
    why = "of messages, only the answers are trained; TRL trains every token"
    if config.get(key) is True:
        yield not_needed(key, "only answers are trained")
    elif key in config:
        yield essential(key, f"{why}; set it to true, or use rows of `text`")
    else:
        yield unmapped(key, f"not set: {why}, unless the rows have a prompt and a completion")
    if config.get("completion_only_loss") is False:
        yield essential(
            "completion_only_loss", "of a prompt and its completion, only the completion is trained"
        )
    elif "completion_only_loss" in config:
        yield not_needed("completion_only_loss", "only completions are trained")
    if "loss_type" in config:
        if config["loss_type"] in ("nll", "chunked_nll"):
            yield not_needed("loss_type", "the loss of the next token")
        else:
            yield essential(
                "loss_type", f"{config['loss_type']}: only the loss of the next token is supported"
            )


def _adapter(config: Config) -> Findings:
    target, lists = "sft.adapter", ("lora_modules_to_save", "lora_target_parameters")
    if "lora_task_type" in config:
        yield not_needed("lora_task_type", "CAUSAL_LM")
    quantized = [key for key in ("load_in_4bit", "load_in_8bit") if config.get(key)]
    if config.get("use_peft") is not True:
        yield from (contradiction(key, "use_peft", "needs an adapter: set use_peft") for key in quantized)
        yield default("use_peft", target, None, "not set: full fine-tuning")
        keys = [key for key in ADAPTER_KEYS[:-1] if key in config and key not in quantized]
        yield from (not_needed(key, "applies only with use_peft") for key in keys)
        yield from (default(key, f"sft.{key}", value=False) for key in ("use_dora", "use_rslora"))
        yield from (default(key, f"sft.{key}", []) for key in lists)
        yield default("loraplus_lr_ratio", "sft.loraplus_lr_ratio", None)
        return
    yield mapped("use_peft", target, "qlora" if "load_in_4bit" in quantized else "lora")
    for key in ("load_in_4bit", "load_in_8bit"):
        if key in config:
            note = "the frozen base keeps base.dtype: more precise than 8 bits, and twice the memory"
            yield (
                mapped(key, target, "lora", note)
                if key in quantized and key == "load_in_8bit"
                else not_needed(key, f"set by {target}")
            )
    for key, (value, convert) in ADAPTER.items():
        found = convert_value(key, f"sft.{key}", config.get(key, value), convert)
        yield found if key in config else default(key, f"sft.{key}", value, "TRL's default")
    yield default("loraplus_lr_ratio", "sft.loraplus_lr_ratio", None)
    names = config.get("lora_target_modules")
    if names is None:
        why = "not set, so PEFT chooses by model type; list them in sft.lora_target_modules"
        yield unmapped("lora_target_modules", why, "sft.lora_target_modules")
    else:
        names = "all-linear" if names in ("all-linear", ["all-linear"]) else names
        names = names if isinstance(names, list) or names == "all-linear" else str(names).split()
        yield mapped("lora_target_modules", "sft.lora_target_modules", names)
    for key in lists:
        values = config.get(key, [])
        values = values if isinstance(values, list) else str(values).split()
        yield mapped(key, f"sft.{key}", values) if key in config else default(key, f"sft.{key}", [])


def _speed(config: Config) -> Findings:
    """Map precision, kernel and activation checkpointing, which TRL turns on."""
    yield from arguments.map_precision(config, "auto")
    name, target = config.get("attn_implementation"), "sft.attn_implementation"
    known = Attention.__args__  # type: ignore[attr-defined]
    if name is None:
        yield default("attn_implementation", target, "auto")
    elif name in known:
        yield mapped("attn_implementation", target, name)
    else:
        yield unmapped("attn_implementation", f"{name} is not supported; set {target}", target)
    keys = [key for key in SPEED_KEYS[1:] if key in config]
    target = "sft.activation_checkpointing"
    if keys:
        yield convert_value(keys[0], target, config[keys[0]], parse_bool)
        yield from (not_needed(key, f"see {keys[0]}") for key in keys[1:])
    else:
        yield default("gradient_checkpointing", target, value=True, note="TRL's default")
    yield default(
        "gradient_checkpointing_kwargs", "sft.use_reentrant", value=False, note="the same gradients"
    )
    dtype = str(config.get("dtype", config.get("torch_dtype", "float32")))
    yield default("dtype", "base.dtype", "bfloat16" if "bfloat16" in dtype else "float32", "TRL's default")
    for key in MODEL_KEYS[2:]:
        if key in config:
            half = "bfloat16" in str(config[key]) or str(config[key]) in ("auto", "float32")
            why = "base.dtype" if half else f"{config[key]}: base.dtype is {dtype}"
            yield not_needed(key, why) if half else unmapped(key, why, "base.dtype")
