"""Map the datasets that dataset_info.json describes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.importers.findings import Config, Findings, essential, mapped, not_needed, parse_int
from infra.importers.hub import Lookup
from infra.importers.sources import Dataset, explain_missing_commit, find_sources, replace_sources
from nightshift.core.errors import DataError
from nightshift.raw.messages import CALLERS, CONTENT_KEYS, ROLE_KEYS, ROLES

INFO = "dataset_info.json"
DATA_KEYS = ("dataset", "dataset_dir", "max_samples", "mask_history", "eval_dataset")
TARGET = "snapshot.sources"
# Column of an Alpaca row in LLaMA-Factory -> name here.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
READ = {
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "file_name", "formatting", "subset", "split", "columns"),
    *("tags", "num_samples", "ranking", "folder"),
}


def map_data(config: Config, folder: Path, hub: Lookup) -> Findings:
    """Map the datasets.

    Args:
        config: Config, key -> value.
        folder: Folder of the file.
        hub: Where commits are looked up.
    """
    names = config.get("dataset", "")
    names = [str(one).strip() for one in (names if isinstance(names, list) else str(names).split(","))]
    try:
        info, place = _read_info(str(config.get("dataset_dir", "data")), folder)
    except ValueError as err:
        yield essential("dataset", str(err), TARGET)
        return
    sources: list[dict[str, Any]] = []
    notes = []
    for name in filter(None, names):
        try:
            found, note = find_sources(_dataset(name, info, place, config), hub)
        except (ValueError, DataError) as err:
            yield essential(f"dataset.{name}", explain_missing_commit(name, err), TARGET)
            continue
        sources += found
        notes.append(note)
    yield from replace_sources("dataset", sources, notes=notes)
    if "dataset_dir" in config:
        yield not_needed("dataset_dir", f"{INFO} was read")
    if "max_samples" in config:
        yield not_needed("max_samples", "the limit of each source")
    if "mask_history" in config:
        yield not_needed("mask_history", "`train_on` of each source, which is `all` unless set")
    if "eval_dataset" in config:
        yield mapped(
            "eval_dataset",
            "split.validation_share",
            0.05,
            "this file is not read: a share of the groups is held out; add it as a benchmark if needed",
        )


def _read_info(name: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the content of dataset_info.json, and its folder.

    Raises:
        ValueError: It cannot be found or read.
    """
    places = [folder / name, Path(name), folder]
    for place in places:
        file = place / INFO
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ValueError(f"{file}: cannot be read ({err}); correct it") from err
        if not isinstance(content, dict):
            raise ValueError(f"{file}: must map names to datasets; correct it")
        return content, place
    raise ValueError(
        f"{INFO} is in none of {', '.join(str(place) for place in places)}; "
        "copy it there, or correct dataset_dir"
    )


def _dataset(name: str, info: Mapping[str, Any], place: Path, config: Config) -> Dataset:
    """Return a dataset of dataset_info.json, with what the config says about all data sets.

    Raises:
        ValueError: It is not defined, is no dataset of answers, or has an unknown key.
    """
    entry = info.get(name)
    if not isinstance(entry, dict):
        known = ", ".join(list(info)[:10])
        raise ValueError(f"{INFO} has no dataset {name!r}; it has {known}")
    if entry.get("ranking"):
        raise ValueError("ranking: pairs of answers are not supervised fine-tuning; choose another dataset")
    if unknown := sorted(entry.keys() - READ):
        raise ValueError(f"{INFO}: {', '.join(unknown)}: not supported; list the file in {TARGET}")
    limits = [parse_int(one) for one in (entry.get("num_samples"), config.get("max_samples")) if one]
    options: dict[str, Any] = {"limit": min(limits)} if limits else {}
    if config.get("mask_history"):
        options["train_on"] = "last"
    columns = dict(_pairs(entry, "columns"))
    if entry.get("formatting", "alpaca") == "alpaca":
        options |= _alpaca(columns)
    else:
        options |= _messages(columns, dict(_pairs(entry, "tags")))
    if "hf_hub_url" in entry:
        return Dataset(
            str(entry["hf_hub_url"]),
            str(entry.get("subset", "")),
            str(entry.get("split", "train")),
            options=options,
        )
    if "file_name" not in entry:
        raise ValueError("no hf_hub_url and no file_name: only files and the Hugging Face Hub are read")
    return Dataset(str(place / str(entry["file_name"])), options=options)


def _pairs(entry: Mapping[str, Any], key: str) -> Iterator[tuple[str, str]]:
    found = entry.get(key, {})
    if not isinstance(found, dict):
        raise ValueError(f"{INFO}: {key} must be a mapping; correct it")
    yield from ((str(name), str(value)) for name, value in found.items())


def _alpaca(columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of rows with a question and an answer, which are joined by a line break."""
    media = [
        name for name in columns if name in ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
    ]
    if media:
        raise ValueError(f"column {media[0]}: only supervised fine-tuning on text is supported")
    named = {ALPACA.get(name, name): column for name, column in columns.items()}
    renamed = {name: column for name, column in named.items() if name != column}
    return {"input_separator": "\n"} | ({"columns": renamed} if renamed else {})


def _messages(columns: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of rows with a list of messages.

    Raises:
        ValueError: A column or a tag has no counterpart.
    """
    media = [name for name in columns if name not in ("messages", "tools", "system")]
    if media:
        raise ValueError(f"column {media[0]}: only supervised fine-tuning on text is supported")
    for tag, known in (("role_tag", ROLE_KEYS), ("content_tag", CONTENT_KEYS), ("function_tag", CALLERS)):
        if tags.get(tag, known[0]) not in known:
            raise ValueError(f"{tag}: {tags[tag]}: rename it to {known[0]} in the rows")
    named = {"messages": "conversations", **columns}
    renamed = {name: column for name, column in named.items() if name != column}
    roles = {tags[tag]: role for tag, role in TAGS.items() if tag in tags and ROLES.get(tags[tag]) != role}
    return ({"columns": renamed} if renamed else {}) | ({"roles": roles} if roles else {})
