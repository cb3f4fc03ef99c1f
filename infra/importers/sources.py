"""Datasets of a config file as sources of the snapshot: location, split, limit, columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from infra.importers.findings import Finding, Findings, default, essential, mapped
from infra.importers.hub import HUB_ID, Lookup, has_parquet, resolve
from nightshift.core.errors import DataError
from nightshift.raw.formats import READABLE, shard_suffix
from tasks.base import HUB as HUB_MODEL
from tasks.snapshot.sources.locations import require_location
from tasks.snapshot.sources.splits import find_split

SLICE = re.compile(r"(?P<split>\w[\w.-]*)(\[:(?P<count>\d+)(?P<percent>%?)\])?")
# Builders of the library `datasets`, which read the files that are listed.
BUILDERS = ("json", "csv", "parquet")
URL = "https://huggingface.co/datasets/{}/resolve/{}/{}"
# Parameters that name sources or benchmarks of the current params.yaml -> value without them.
LEFTOVERS: dict[str, Any] = {
    "snapshot.benchmarks": {},
    "split.by_phrasing": [],
    "augment.sources": [],
    "evaluate.retrieval": None,
    "gate.floors": {},
    "gate.retention": {},
    "gate.behaviour": [],
}


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset as a tool names it.

    Attributes:
        path: Hub id, file, folder, URL, or the name of a builder.
        name: Config of a Hub dataset.
        split: Split, with an optional slice.
        revision: Revision of a Hub dataset.
        files: Files in the folder or repository.
        options: Further options of the source.
    """

    path: str
    name: str = ""
    split: str = "train"
    revision: str = ""
    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_split(text: str) -> tuple[str, int | float | None]:
    """Return the split, and the limit that a slice from the start sets.

    Raises:
        ValueError: The slice does not begin at the start, or several splits are joined.

    Example:
        >>> parse_split("train"), parse_split("train[:1%]"), parse_split("train_sft[:100]")
        (('train', None), ('train', 0.01), ('train_sft', 100))
    """
    found = SLICE.fullmatch(text.replace(" ", ""))
    if not found:
        raise ValueError(
            f"split {text!r} is not supported, only slices from the start; write the rows to a file, and "
            "list it in snapshot.sources"
        )
    if found["count"] is None:
        return found["split"], None
    number = int(found["count"]) / 100 if found["percent"] else int(found["count"])
    if not number:
        raise ValueError(f"split {text!r} has no rows; correct it")
    return found["split"], None if found["percent"] and number >= 1 else number


def is_local(name: str) -> bool:
    """Return whether a name is a local path rather than a Hub id."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def find_sources(dataset: Dataset, hub: Lookup) -> tuple[list[dict[str, Any]], str]:
    """Return the sources that a dataset becomes, and a note.

    Raises:
        ValueError: A source cannot express the dataset.
        DataError: The Hub does not know it.
    """
    split, limit = parse_split(dataset.split)
    path = re.sub("^gcs://", "gs://", dataset.path)
    note = ""
    if HUB_ID.fullmatch(path) and not is_local(path) and not shard_suffix(path):
        locations, note = _on_hub(dataset, path, hub)
    else:
        locations, split = _in_files(dataset, path), _split_of(path, split)
    options: dict[str, Any] = {}
    if split and not any(location.startswith("https://") for location in locations):
        options["split"] = split
    if limit is not None:
        options["limit"] = limit
        note = "; ".join([*([note] if note else []), _explain(limit, len(locations))])
    for location in locations:
        require_location(location)
    # The newest content of a path is the whole dataset.
    more = {"mode": "replace", **options, **dataset.options}
    return [{"path": location, **more} for location in locations], note


def _explain(limit: float, files: int) -> str:
    if isinstance(limit, float):
        return f"a share of {limit:g} by the hash of the rows, not the first ones"
    return f"the first {limit} rows" + (" of each file" if files > 1 else "")


def _in_files(dataset: Dataset, path: str) -> list[str]:
    """Return the locations of files that are not on the Hub.

    Raises:
        ValueError: There is no file that ingest can read.
    """
    if path in BUILDERS and dataset.files:
        found = list(dataset.files)
    elif Path(path).is_dir() and not dataset.files:
        # The snapshot reads a folder as a whole.
        return [path] if any(shard_suffix(file.name) for file in Path(path).rglob("*")) else _refuse(path)
    else:
        found = [f"{path.rstrip('/')}/{name}" for name in dataset.files] or [path]
    return found if found and all(map(shard_suffix, found)) else _refuse(path)


def _refuse(path: str) -> NoReturn:
    raise ValueError(
        f"{path}: no file that ingest can read ({READABLE}); list such files in snapshot.sources"
    )


def _split_of(path: str, split: str) -> str:
    """Return the split if the files of a folder name splits; a single file has none."""
    if not Path(path).is_dir():
        return ""
    files = [file.relative_to(path).as_posix() for file in Path(path).rglob("*") if shard_suffix(file.name)]
    return split if any(find_split(name) for name in files) else ""


def _on_hub(dataset: Dataset, path: str, hub: Lookup) -> tuple[list[str], str]:
    """Return the locations of a Hub dataset, and a note.

    Raises:
        ValueError: It has several configs and none is named, or files that cannot be read.
        DataError: No commit is given, and it cannot be looked up.
    """
    if dataset.files and not all(name.endswith(".parquet") for name in dataset.files):
        return _hub_files(dataset, path, hub)
    repository, note = resolve(hub, "dataset", path, dataset.revision)
    where = f"hub:{repository.identity}@{repository.commit}"
    if dataset.files:
        return [f"{where}/{name}" for name in dataset.files], note
    if not has_parquet(repository.files):
        raise ValueError(
            f"{path}: its commit {repository.commit[:12]} has no Parquet files; remove the revision, so that "
            "the branch refs/convert/parquet is used, or list files in snapshot.sources"
        )
    configs = repository.list_configs()
    partial = any("/partial-" in name for name in repository.files)
    if partial:
        raise ValueError(
            f"{path}: too large for the branch refs/convert/parquet, which has only a part of it; set its "
            "commit on the branch main as revision"
        )
    if dataset.name:
        if configs and dataset.name not in configs:
            raise ValueError(f"{path}: no config {dataset.name!r}; choose one of {', '.join(configs)}")
        return [f"{where}/{dataset.name}/*"], note
    if len(configs) > 1 and "default" not in configs:
        raise ValueError(f"{path}: has the configs {', '.join(configs)}; choose one as `name`")
    return [f"{where}/default/*" if len(configs) > 1 else where], note


def _hub_files(dataset: Dataset, path: str, hub: Lookup) -> tuple[list[str], str]:
    """Return the URLs of files in a Hub dataset that are not Parquet.

    Raises:
        ValueError: A file cannot be read.
        DataError: No commit is given, and it cannot be looked up.
    """
    if wrong := [name for name in dataset.files if not shard_suffix(name) or "*" in name]:
        raise ValueError(f"{path}: {wrong[0]}: not a file that ingest can read ({READABLE})")
    repository, note = resolve(hub, "dataset", path, dataset.revision or "main")
    return [URL.format(repository.identity, repository.commit, name) for name in dataset.files], note


def name_sources(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Give each source a unique name that is valid as a folder name.

    Example:
        >>> files = ["data/My-Chats.jsonl", "old/my_chats.jsonl", "2024.csv"]
        >>> name_sources([{"path": path} for path in files])  # doctest: +NORMALIZE_WHITESPACE
        {'my_chats': {'path': 'data/My-Chats.jsonl'}, 'my_chats_2': {'path': 'old/my_chats.jsonl'},
         'source_2024': {'path': '2024.csv'}}
    """
    named: dict[str, Any] = {}
    for source in sources:
        location = str(source["path"])
        hub = location.removeprefix("hub:").split("@")[0] if location.startswith("hub:") else location
        last = [part for part in hub.split("/") if "*" not in part][-1]
        stem = re.sub(r"[^a-z0-9]+", "_", last.split(".")[0].lower()).strip("_")[:56]
        stem = stem if re.match("[a-z]", stem) else f"source_{stem}".rstrip("_")
        name, count = stem, 1
        while name in named:
            count += 1
            name = f"{stem}_{count}"
        named[name] = source
    return named


def replace_sources(key: str, sources: Sequence[dict[str, Any]], *, notes: Sequence[str] = ()) -> Findings:
    """Yield the findings that replace the current sources and what refers to them.

    Args:
        key: Key of the file that lists the datasets.
        sources: Sources; none keeps the current ones.
        notes: What to say about them.
    """
    if not sources:
        yield essential(key, "no dataset could be mapped: the current sources hold", "snapshot.sources")
        return
    note = "; ".join(["replaces the current sources", *dict.fromkeys(note for note in notes if note)])
    yield mapped(key, "snapshot.sources", name_sources(sources), note)
    for target, value in LEFTOVERS.items():
        yield default(key, target, value, "it named the replaced sources or benchmarks; add your own")


def keep_test_share() -> Finding:
    """Return the finding for the test set, which the other tools do not have."""
    return default(
        "test set",
        "split.test_share",
        0.1,
        "the tool has none; without benchmarks, the gate judges by the loss on this share of the groups",
    )


def map_base(key: str, name: str, revision: str, hub: Lookup) -> Finding:
    """Return the finding for the base model: a local folder, or a Hub model at a commit.

    Args:
        key: Keys of the file that name it.
        name: Folder or Hub id.
        revision: Commit, branch or tag; empty for the newest commit.
        hub: Where commits are looked up.
    """
    if not name:
        return essential(key, "not set; set base.model", "base.model")
    if is_local(name):
        note = "a local folder has no revision" if revision else ""
        return mapped(key, "base.model", name, note)
    try:
        repository, note = resolve(hub, "model", name, revision)
    except DataError as err:
        identity = name if "/" in name else f"<owner>/{name}"
        return essential(
            key,
            f"{err}. Set base.model to hub:{identity}@<commit>, the first word of "
            f"`git ls-remote https://huggingface.co/{identity} HEAD`",
            "base.model",
        )
    reference = f"hub:{repository.identity}@{repository.commit}"
    if not HUB_MODEL.fullmatch(reference):
        return essential(key, f"{name}: not <owner>/<name>; set base.model", "base.model")
    return mapped(key, "base.model", reference, note)


def explain_missing_commit(path: str, err: Exception) -> str:
    """Return why a dataset could not be located, with the remedy if its commit is unknown."""
    if isinstance(err, DataError):
        return (
            f"{err}. Add `revision: <commit>`, the first word of `git ls-remote "
            f"https://huggingface.co/datasets/{path} refs/convert/parquet`, which has it as Parquet files"
        )
    return str(err)
