"""Map the base model, the datasets and how rows become text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.importers.axolotl.findings import (
    Config,
    Finding,
    Findings,
    contradiction,
    mapped,
    not_needed,
    parse_float,
    unmapped,
)
from nightshift.core.config import suggestion
from nightshift.raw.formats import READABLE, shard_suffix
from tasks.base import HUB as HUB_MODEL
from tasks.snapshot.sources.locations import require_location

MODEL_KEYS = (
    *("base_model", "base_model_config", "tokenizer_config"),
    *("revision_of_model", "model_revision", "base_model_revision"),
)
DATA_KEYS = ("datasets", "test_datasets", "val_set_size")
TEXT_KEYS = ("train_on_inputs", "chat_template", "special_tokens", "shuffle_merged_datasets")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Dataset types that ingest recognises by the keys of a row.
TYPES = ("alpaca", "chat_template", "sharegpt", "completion")
# Values that match what ingest does by default.
USUAL: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "jsonl", "csv", "parquet"),
    "field_messages": ("messages", "conversations"),
    "field_tools": ("tools",),
    "field": ("text",),
    "chat_template": ("tokenizer_default",),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": (
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ),
    "trust_remote_code": (False,),
    "field_human": ("human",),
    "field_model": ("gpt",),
}
LOCATED = ("path", "type", "data_files", "split", "name", "revision")
OTHER = (
    *("input_transform", "shards", "shards_idx", "preprocess_shards", "conversation", "chat_template_jinja"),
    *("input_format", "field_thinking", "template_thinking_key", "message_field_training", "split_thinking"),
    *("message_field_training_detail", "roles", "drop_system_message", "temperature", "logprobs_field"),
)
BUILDERS = ("json", "csv", "parquet")


def map_model(config: Config) -> Findings:
    """Map the base model: a local folder, or a Hub model at a commit."""
    name = str(config.get("base_model", ""))
    for key in ("base_model_config", "tokenizer_config"):
        if key in config and config[key] == config.get("base_model"):
            yield not_needed(key, "read from the base's files")
        elif key in config:
            yield unmapped(
                key, f"{config[key]}: read from the base's files; put the file into a local copy of the base"
            )
    revisions = [key for key in MODEL_KEYS[3:] if key in config]
    if len({str(config[key]) for key in revisions}) > 1:
        yield contradiction(revisions[0], revisions[1], "two revisions; remove one")
        return
    revision = str(config[revisions[0]]) if revisions else ""
    reference = f"hub:{name}@{revision}"
    if not name:
        yield unmapped("base_model", "not set; set base.model")
    elif is_local(name):
        yield mapped("base_model", "base.model", name)
        yield from (not_needed(key, "the base is a local folder") for key in revisions)
    elif HUB_MODEL.fullmatch(reference):
        yield mapped(" and ".join(["base_model", *revisions]), "base.model", reference)
    else:
        what = f"{revision!r} may change" if revision else "no commit is given"
        identity = name if "/" in name else f"<owner>/{name}"
        yield unmapped(
            " and ".join(["base_model", *revisions]),
            f"{what}; set base.model to hub:{identity}@<commit>, the first word of "
            f"`git ls-remote https://huggingface.co/{identity} HEAD`",
        )


def is_local(name: str) -> bool:
    """Return whether a name is a local path rather than a Hub id."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def map_data(config: Config) -> Findings:
    """Map the data sources and the validation share."""
    share = config.get("val_set_size")
    if share and "test_datasets" in config:
        yield contradiction("val_set_size", "test_datasets", "choose one; the stage split holds out a share")
    elif share is not None:
        yield _validation(share)
    if "test_datasets" in config:
        yield unmapped(
            "test_datasets",
            "the stage split holds out groups; set split.validation_share or snapshot.benchmarks",
        )
    rows = config.get("datasets", [])
    locations: list[str] = []
    for place, row in enumerate(rows if isinstance(rows, list) else [rows]):
        found = list(_dataset(f"datasets[{place}]", row))
        locations += [finding.value for finding in found if finding.kind == "mapped"]
        yield from (finding for finding in found if finding.kind != "mapped")
    if rows and not locations:
        yield unmapped("datasets", "none of them could be mapped: the current snapshot.sources are kept")
    if locations:
        yield mapped("datasets", "snapshot.sources", name_sources(locations), "replaces the current sources")
        for target in ("split.by_phrasing", "augment.sources"):
            yield mapped("datasets", target, [], "it listed the replaced sources; list new ones if needed")


def _validation(share: Any) -> Finding:
    try:
        if not 0 <= parse_float(share) < 1:
            raise ValueError(
                f"{share} is a number of rows; set split.validation_share to a share (0 to 1) of the groups"
            )
    except ValueError as err:
        return unmapped("val_set_size", str(err))
    return mapped(
        "val_set_size",
        "split.validation_share",
        parse_float(share),
        "a share of the groups of near-duplicates",
    )


def _dataset(where: str, row: Any) -> Findings:
    """Yield one mapped finding for each location of a dataset, or why the dataset cannot be read."""
    row = (
        {key: value for key, value in row.items() if value is not None}
        if isinstance(row, dict)
        else {"path": row}
    )
    kind = row.get("type", "chat_template")
    if not isinstance(kind, str) or re.split(r"[.:]", kind)[0] not in TYPES:
        shown = kind if isinstance(kind, str) else "custom format"
        yield unmapped(
            f"{where}.type",
            f"{shown}: not supported; write rows of messages, instruction and output, or text, and list the "
            "file in snapshot.sources",
        )
        return
    try:
        locations = locate(row)
    except ValueError as err:
        yield unmapped(where, str(err))
        return
    yield from (mapped(where, "snapshot.sources", location) for location in locations)
    yield from (_column(f"{where}.{key}", key, row[key]) for key in row if key not in LOCATED)


def locate(row: dict[str, Any]) -> list[str]:
    """Return the locations of a dataset for snapshot.sources.

    Raises:
        ValueError: snapshot.sources cannot express the dataset.

    Example:
        >>> locate({"path": "json", "data_files": ["chats.jsonl", "more.jsonl.gz"]})
        ['chats.jsonl', 'more.jsonl.gz']
        >>> locate({"path": "tatsu-lab/alpaca", "revision": "0" * 40, "split": "train"})
        ['hub:tatsu-lab/alpaca@0000000000000000000000000000000000000000/*train*']
    """
    path = re.sub("^gcs://", "gs://", str(row.get("path", "")))
    files = row.get("data_files", [])
    names = [str(name) for name in (files if isinstance(files, list) else [files])]
    if HUB_ID.fullmatch(path) and not is_local(path) and not shard_suffix(path):
        found = _hub(path, row, names)
    elif path in BUILDERS and names:
        found = names
    elif Path(path).is_dir() and not names:
        suffixes = {shard_suffix(file.name) for file in Path(path).iterdir()} - {None}
        found = sorted(f"{path.rstrip('/')}/*{suffix}" for suffix in suffixes)
    else:
        found = [f"{path.rstrip('/')}/{name}" for name in names] or [path]
    if not found or any(not shard_suffix(name) for name in found if not name.startswith("hub:")):
        raise ValueError(
            f"{path}: no file that ingest can read ({READABLE}); list such files in snapshot.sources"
        )
    for name in found:
        require_location(name)
    return found


def _hub(path: str, row: dict[str, Any], files: list[str]) -> list[str]:
    split, revision = str(row.get("split", "")), str(row.get("revision", ""))
    if not COMMIT.fullmatch(revision):
        what = f"revision {revision!r} may change" if revision else "no commit is given"
        raise ValueError(
            f"{path}: {what}; add `revision: <commit>`, the first word of `git ls-remote "
            f"https://huggingface.co/datasets/{path} refs/convert/parquet`, which has it as Parquet files"
        )
    if "[" in split or "+" in split:
        raise ValueError(
            f"{path}: split {split!r} is not supported; prepare a file, list it in snapshot.sources"
        )
    if wrong := [name for name in files if not name.endswith(".parquet")]:
        raise ValueError(
            f"{path}: {wrong[0]} is not Parquet; use a commit of refs/convert/parquet, without data_files"
        )
    words = [str(row[key]) for key in ("name", "split") if key in row]
    globs = files or ([f"*{'*'.join(words)}*"] if words else [])
    return [f"hub:{path}@{revision}/{pattern}" for pattern in globs] or [f"hub:{path}@{revision}"]


def name_sources(locations: Sequence[str]) -> dict[str, str]:
    """Give each location a unique name that is valid as a folder name.

    Example:
        >>> name_sources(["data/My-Chats.jsonl", "old/my_chats.jsonl", "2024.csv"])
        {'my_chats': 'data/My-Chats.jsonl', 'my_chats_2': 'old/my_chats.jsonl', 'source_2024': '2024.csv'}
    """
    named: dict[str, str] = {}
    for location in locations:
        hub = location.removeprefix("hub:").split("@")[0] if location.startswith("hub:") else location
        stem = re.sub(r"[^a-z0-9]+", "_", hub.split("/")[-1].split(".")[0].lower()).strip("_")
        stem = stem if re.match("[a-z]", stem) else f"source_{stem}".rstrip("_")
        name, count = stem, 1
        while name in named:
            count += 1
            name = f"{stem}_{count}"
        named[name] = location
    return named


def _column(where: str, key: str, value: Any) -> Finding:
    if key in USUAL and value in USUAL[key]:
        return not_needed(where, "the default of ingest")
    if key in USUAL or key in OTHER:
        if value in (False, []):
            return not_needed(where, "off")
        return unmapped(where, f"{value}: the keys of a row determine its format; write the file as messages")
    return unmapped(where, f"unknown; {suggestion(key, [*LOCATED, *USUAL, *OTHER])}")


def map_text(config: Config) -> Findings:
    """Map how rows become tokens: the base's chat template, loss on answers only."""
    if "train_on_inputs" in config:
        yield _only_if(
            "train_on_inputs",
            "only assistant turns are labelled",
            "use rows of `text` to train on every token",
            is_so=config["train_on_inputs"] is False,
        )
    template = str(config.get("chat_template", ""))
    if template:
        yield _only_if(
            "chat_template",
            "the base's chat template is used",
            f"check that it is {template}, or put chat_template.jinja into a local copy of the base",
            is_so=template.startswith("tokenizer_default"),
        )
    tokens = config.get("special_tokens")
    for name, value in tokens.items() if isinstance(tokens, dict) else ():
        yield _only_if(
            f"special_tokens.{name}",
            "padding is never labelled"
            if name == "pad_token"
            else f"{value}: the base's special tokens are used",
            "change them in a local copy of the base and set base.model",
            is_so=name == "pad_token" or value is None,
        )
    if "shuffle_merged_datasets" in config:
        yield _only_if(
            "shuffle_merged_datasets",
            "rows are shuffled with sft.seed",
            "a fixed order is not supported",
            is_so=bool(config["shuffle_merged_datasets"]),
        )


def _only_if(key: str, why: str, remedy: str, *, is_so: bool) -> Finding:
    """Return the finding for a key that has a single supported value."""
    return not_needed(key, why) if is_so else unmapped(key, f"{why}; {remedy}")
