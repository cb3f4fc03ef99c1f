"""Map the base model, the datasets and how rows become text."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.importers.axolotl.templates import CONVERSATIONS, SAME_TEXT
from infra.importers.findings import (
    Config,
    Finding,
    Findings,
    contradiction,
    default,
    essential,
    mapped,
    not_needed,
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
    map_base,
    replace_sources,
)
from nightshift.core.config import suggestion
from nightshift.core.errors import DataError
from nightshift.data.chat_templates import ALPACA_SEPARATOR
from nightshift.raw.messages import CONTENT_KEYS, ROLE_KEYS, ROLES

MODEL_KEYS = (
    *("base_model", "base_model_config", "tokenizer_config"),
    *("revision_of_model", "model_revision", "base_model_revision"),
)
DATA_KEYS = ("datasets", "test_datasets", "val_set_size", "excess_length_strategy")
TEXT_KEYS = (
    *("train_on_inputs", "chat_template", "chat_template_jinja", "special_tokens", "tokens"),
    *("shuffle_merged_datasets", "eot_tokens", "default_system_message"),
)
TEMPLATE = "base.chat_template"
# Dataset types whose rows become messages, the Alpaca prompt, or plain text.
CHATS, ALPACA, TEXT = ("chat_template", "sharegpt"), "alpaca", "completion"
READ = (
    *("path", "type", "data_files", "split", "name", "revision", "field", "field_messages", "field_tools"),
    *("message_property_mappings", "message_field_role", "message_field_content", "roles", "shards"),
    *("conversation", "chat_template"),
)
# Values that match what ingest does.
USUAL: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "jsonl", "csv", "parquet"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "trust_remote_code": (False,),
    "field_human": ("human",),
    "field_model": ("gpt",),
    "shards_idx": (0,),
}
# Keys that Axolotl reads only for these types.
UNREAD = dict.fromkeys(("field_messages", "field_tools", "roles", "chat_template"), CHATS) | {
    "field": (TEXT,)
}
# Keys that name the reasoning of a message, and the names that ingest reads.
THINKING = ("field_thinking", "template_thinking_key")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
# Keys of a dataset that say only how it is processed.
PROCESSING = ("preprocess_shards",)
OTHER = (
    *("input_transform", "chat_template_jinja", "input_format", "field_thinking", "template_thinking_key"),
    *("message_field_training", "message_field_training_detail", "split_thinking", "drop_system_message"),
    *("temperature", "logprobs_field"),
)
REPLACED, ADDITIONAL = ("bos_token", "eos_token", "unk_token"), "additional_special_tokens"
OVER_LENGTH = {"drop": "drop", "truncate": "truncate", "raise": "error"}


def map_model(config: Config, hub: Lookup) -> Findings:
    """Map the base model: a local folder, or a Hub model at a commit."""
    for key in ("base_model_config", "tokenizer_config"):
        if key in config and config[key] == config.get("base_model"):
            yield not_needed(key, "read from the base's files")
        elif key in config:
            why = f"{config[key]}: read from the base's files; put the file into a local copy of the base"
            yield essential(key, why, "base.model")
    revisions = [key for key in MODEL_KEYS[3:] if key in config]
    if len({str(config[key]) for key in revisions}) > 1:
        yield contradiction(revisions[0], revisions[1], "two revisions; remove one")
        return
    revision = str(config[revisions[0]]) if revisions else ""
    yield map_base(" and ".join(["base_model", *revisions]), str(config.get("base_model", "")), revision, hub)


def map_data(config: Config, hub: Lookup) -> Findings:
    """Map the data sources, the validation share, the template, and what happens to long examples."""
    yield from _validation(config)
    rows = config.get("datasets", [])
    rows = [_as_dict(row) for row in (rows if isinstance(rows, list) else [rows])]
    sources: list[dict[str, Any]] = []
    notes = []
    for place, row in enumerate(rows):
        try:
            found, note = find_sources(_dataset(row), hub)
        except (ValueError, DataError) as err:
            why = explain_missing_commit(str(row.get("path", "")), err)
            yield essential(f"datasets[{place}]", why, "snapshot.sources")
            continue
        faults = [one for one in _columns(f"datasets[{place}]", row) if one.kind != "mapped"]
        yield from faults
        if not any(one.is_essential for one in faults):
            sources += found
            notes.append(note)
    yield from replace_sources("datasets", sources, notes=notes)
    yield keep_test_share()
    yield from _template(config, rows)
    yield from _over_length(config, rows)


def _as_dict(row: Any) -> dict[str, Any]:
    """Return the given keys of a dataset, which may be just its path."""
    if not isinstance(row, dict):
        return {"path": str(row)}
    return {str(key): value for key, value in row.items() if value is not None}


def _validation(config: Config) -> Findings:
    share = config.get("val_set_size")
    if share and "test_datasets" in config:
        yield contradiction("val_set_size", "test_datasets", "choose one; the stage split holds out a share")
        return
    if "test_datasets" in config:
        yield unmapped(
            "test_datasets",
            "the stage split holds out groups of near-duplicates; set split.validation_share, or list the "
            "file in snapshot.benchmarks",
            "split.validation_share",
        )
        return
    target, note = "split.validation_share", "a share of the groups of near-duplicates"
    if share is None:
        yield default("val_set_size", target, 0.0, "Axolotl's default: nothing is held out")
        return
    try:
        number = parse_float(share)
        if not 0 <= number < 1:
            raise ValueError(
                f"{share} is a number of rows; set split.validation_share to a share (0 to 1) of the groups"
            )
        yield mapped("val_set_size", target, number, note)
    except ValueError as err:
        yield unmapped("val_set_size", str(err), target)


def _kind(row: Mapping[str, Any]) -> str:
    """Return the type of a dataset without the style; a custom format has none."""
    kind = row.get("type", "chat_template")
    if not isinstance(kind, str):
        return ""
    return kind.partition(":")[0].partition(".")[0] if kind.startswith("sharegpt") else kind


def _dataset(row: Mapping[str, Any]) -> Dataset:
    """Return a dataset with the options that its type needs.

    Raises:
        ValueError: The type is not supported.
    """
    kind = _kind(row)
    if kind not in (*CHATS, ALPACA, TEXT):
        shown = row["type"] if isinstance(row["type"], str) else "custom format"
        raise ValueError(
            f"type {shown}: not supported; write rows of messages, instruction and output, or text, and list "
            "the file in snapshot.sources"
        )
    options: dict[str, Any] = {}
    if kind == ALPACA:
        options["input_separator"] = ALPACA_SEPARATOR
    if kind == TEXT:
        options["columns"] = {"text": str(row.get("field", "text"))}
    if kind in CHATS:
        options |= _chat_options(row, "conversations" if kind == "sharegpt" else "messages")
    split = str(row.get("split", "train"))
    if "shards" in row:
        count = parse_int(row["shards"])
        if "[" in split or count < 1 or parse_int(row.get("shards_idx", 0)):
            raise ValueError("shards with a slice, or another shard than the first, is not supported")
        options |= {"limit": 1 / count} if count > 1 else {}
    files = row.get("data_files", [])
    return Dataset(
        path=str(row.get("path", "")),
        name=str(row.get("name", "")),
        split=split,
        revision=str(row.get("revision", "")),
        files=tuple(str(name) for name in (files if isinstance(files, list) else [files])),
        options=options,
    )


def _chat_options(row: Mapping[str, Any], usual: str) -> dict[str, Any]:
    """Return the columns and roles of a dataset with messages."""
    columns = {"messages": str(row.get("field_messages", usual))}
    if row.get("field_tools", "tools") != "tools":
        columns["tools"] = str(row["field_tools"])
    columns = {key: column for key, column in columns.items() if key != column}
    roles = dict(_speakers(row.get("roles")))
    return ({"columns": columns} if columns else {}) | ({"roles": roles} if roles else {})


def _speakers(roles: Any) -> Iterator[tuple[str, str]]:
    """Yield speaker and role where ingest does not know them."""
    for role, names in roles.items() if isinstance(roles, dict) else ():
        for name in names if isinstance(names, list) else [names]:
            if ROLES.get(str(name).lower()) != role:
                yield str(name), str(role)


def _columns(where: str, row: Mapping[str, Any]) -> Findings:
    """Yield a finding for each key of a dataset that its source does not express."""
    kind = _kind(row)
    for key, value in row.items():
        name = f"{where}.{key}"
        if key in UNREAD and kind not in UNREAD[key]:
            yield not_needed(name, f"Axolotl does not read it for type {kind}")
        elif key in ("message_property_mappings", "message_field_role", "message_field_content"):
            yield _properties(name, key, value)
        elif key == "roles" and not isinstance(value, dict):
            yield essential(name, f"{value}: must map a role to its names", "snapshot.sources")
        elif key not in READ:
            yield _other_key(name, key, value)


def _other_key(name: str, key: str, value: Any) -> Finding:
    """Return the finding for a key that no source expresses."""
    if (key in USUAL and value in USUAL[key]) or (key in THINKING and value in REASONING):
        return not_needed(name, "as in ingest")
    if key in PROCESSING or value is False or value == []:
        return not_needed(name, "off, or without an effect on the rows")
    if key in USUAL or key in OTHER:
        why = f"{value}: has no counterpart; write the file as plain messages"
        return essential(name, why, "snapshot.sources")
    return essential(name, f"unknown; {suggestion(key, [*READ, *USUAL, *OTHER])}", "snapshot.sources")


def _properties(name: str, key: str, value: Any) -> Finding:
    """Return the finding for the names of role and content in a message."""
    if key == "message_property_mappings":
        names = value if isinstance(value, dict) else {"?": value}
    else:
        names = {"role" if key == "message_field_role" else "content": value}
    known = {"role": ROLE_KEYS, "content": CONTENT_KEYS}
    wrong = [f"{one}: {column}" for one, column in names.items() if column not in known.get(one, (one,))]
    if wrong:
        why = f"{', '.join(wrong)}: rename these keys of the messages to role and content"
        return essential(name, why, "snapshot.sources")
    return not_needed(name, "ingest knows these names")


def _template(config: Config, rows: Sequence[Mapping[str, Any]]) -> Findings:
    """Yield which prompt the rows get; a file has one template, so its datasets must agree."""
    kinds = {_kind(row) for row in rows}
    has_chats, has_alpaca = bool(kinds & {*CHATS, ""}), ALPACA in kinds
    if has_chats and has_alpaca:
        yield essential(
            "datasets",
            "alpaca and chat_template have different prompts, and all rows here share one; choose a type for "
            f"all of them, and set {TEMPLATE}",
            TEMPLATE,
        )
    if has_alpaca and not has_chats:
        yield mapped("datasets", TEMPLATE, "alpaca", "the prompt of type alpaca")
        for key in ("chat_template", "chat_template_jinja"):
            if key in config:
                yield not_needed(key, "Axolotl does not use it for type alpaca")
        return
    names = {name for row in rows if _kind(row) in CHATS if (name := _own_template(row, config))}
    if len(names) > 1:
        yield essential("datasets", f"several templates: {', '.join(sorted(names))}; choose one", TEMPLATE)
    elif names:
        yield _map_template(names.pop(), config)
        if "chat_template_jinja" in config and config.get("chat_template") != "jinja":
            yield not_needed("chat_template_jinja", "Axolotl reads it only with chat_template: jinja")
    else:
        yield default("chat_template", TEMPLATE, None, "Axolotl's default: that of the tokenizer")
        yield from (
            not_needed(key, "no dataset uses it")
            for key in ("chat_template", "chat_template_jinja")
            if key in config
        )


def _own_template(row: Mapping[str, Any], config: Config) -> str:
    """Return the name of the template of a dataset, or an empty string."""
    if _kind(row) == "sharegpt" and "conversation" in row:
        return CONVERSATIONS.get(str(row["conversation"]), str(row["conversation"]))
    own = row.get("chat_template", config.get("chat_template"))
    if own is None and config.get("chat_template_jinja") is not None:
        return "jinja"
    return str(own or ("vicuna" if _kind(row) == "sharegpt" else ""))


def _map_template(name: str, config: Config) -> Finding:
    """Return the finding for a template by its name."""
    key = "chat_template" if "chat_template" in config else "datasets"
    jinja = str(config.get("chat_template_jinja", ""))
    if name == "jinja":
        if jinja and "\n" not in jinja and Path(jinja).is_file():
            return mapped("chat_template_jinja", TEMPLATE, jinja)
        why = f"save the template in a file, and set {TEMPLATE} to its path"
        return essential("chat_template_jinja" if jinja else key, why, TEMPLATE)
    if name.startswith("tokenizer_default"):
        fallback = name.removeprefix("tokenizer_default_fallback_")
        note = f"if it has none, set {SAME_TEXT.get(fallback, fallback)}" if "fallback" in name else ""
        return mapped(key, TEMPLATE, None, note or "that of the tokenizer")
    if name == "vicuna" or name in SAME_TEXT:
        note = "" if SAME_TEXT.get(name, name) == name else "the same text for conversations without tools"
        return mapped(key, TEMPLATE, SAME_TEXT.get(name, name), note)
    why = (
        f"{name}: no template here has this text; save Axolotl's {name}.jinja in a file, and set {TEMPLATE} "
        "to its path, or to null for the tokenizer's own"
    )
    return essential(key, why, TEMPLATE)


def _over_length(config: Config, rows: Sequence[Mapping[str, Any]]) -> Findings:
    """Yield what happens to examples longer than a row; Axolotl always splits plain text."""
    key, target = "excess_length_strategy", "pack.over_length"
    value = str(config.get(key, "drop"))
    kinds = {_kind(row) for row in rows}
    if value not in OVER_LENGTH:
        yield unmapped(key, f"{value!r} is unknown; set {target} to error, drop, truncate or split", target)
    elif TEXT in kinds:
        others = len(kinds) > 1
        note = "type completion is split" + ("; chats are split before a user turn" if others else "")
        yield mapped("datasets", target, "split", note)
        if key in config:
            yield not_needed(key, "type completion is split before")
    else:
        note = "at most pack.max_lost_token_share of the tokens may be lost"
        found = mapped(key, target, OVER_LENGTH[value], note if value in ("drop", "truncate") else "")
        yield found if key in config else default(key, target, "drop", f"Axolotl's default; {note}")


def map_text(config: Config) -> Findings:
    """Map what is trained, and special tokens."""
    if "train_on_inputs" in config:
        if config["train_on_inputs"] is False:
            yield not_needed("train_on_inputs", "only assistant turns are labelled")
        else:
            why = "only assistant turns are labelled; use rows of `text` to train on every token"
            yield essential("train_on_inputs", why)
    yield from _tokens(config)
    if "default_system_message" in config:
        why = "add it to the rows as a system message"
        yield essential("default_system_message", why, "snapshot.sources")
    if "eot_tokens" in config:
        why = "the end of turn that the template writes after an answer is always trained"
        yield not_needed("eot_tokens", why)
    if "shuffle_merged_datasets" in config:
        if config["shuffle_merged_datasets"]:
            yield not_needed("shuffle_merged_datasets", "rows are shuffled with sft.seed")
        else:
            why = "rows are shuffled with sft.seed; a fixed order is not supported"
            yield unmapped("shuffle_merged_datasets", why)


def _tokens(config: Config) -> Findings:
    given = config.get("special_tokens", {})
    given = given if isinstance(given, dict) else {"?": given}
    added = _as_texts(config.get("tokens", [])) + _as_texts(given.get(ADDITIONAL) or [])
    tokens = {name: str(given[name]) for name in REPLACED if given.get(name) is not None}
    for name, value in given.items():
        key = f"special_tokens.{name}"
        if name == "pad_token" or value is None:
            yield not_needed(key, "padding is never labelled" if name == "pad_token" else "empty")
        elif name not in (*REPLACED, ADDITIONAL):
            yield essential(key, f"{value}: list it under `tokens`", "base.special_tokens")
    # Axolotl adds a special token that the vocabulary lacks; here, one that it has is not added again.
    added += [token for token in tokens.values() if token not in added]
    sources = [*(["tokens"] if "tokens" in config else [])]
    sources += [f"special_tokens.{name}" for name in (ADDITIONAL, *REPLACED) if given.get(name)]
    if sources:
        yield mapped(" and ".join(sources), "base.added_tokens", added)
    else:
        yield default("tokens", "base.added_tokens", [])
    if tokens:
        yield mapped(" and ".join(f"special_tokens.{name}" for name in tokens), "base.special_tokens", tokens)
    else:
        yield default("special_tokens", "base.special_tokens", {}, "those of the tokenizer")


def _as_texts(value: Any) -> list[str]:
    """Return the texts of a list, or of a mapping from name to text."""
    if isinstance(value, dict):
        return [str(text) for text in value.values()]
    return [str(text) for text in (value if isinstance(value, list) else [value])]
