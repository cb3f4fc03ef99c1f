"""Write data/start: the version from which the next training starts, if `sft.start_from` is `champion`.

Which version it is follows from the registry and the shards in use, and not from when the snapshot runs: the
champion if there is a shard that it was not trained on, and otherwise the version from which the champion
itself started. So a night without new data finds its inputs unchanged, and a change of parameters repeats the
champion's training instead of adding another one. A version of which examples were forgotten is no start,
since its weights would carry them on; the version from which it started is.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from nightshift.core.config import config_error, read_params
from nightshift.core.files import read_json, write_json
from nightshift.core.paths import RAW, START, START_MODEL, START_RECORD, START_ROWS
from nightshift.raw.forgotten import read_forgotten
from nightshift.raw.shards import read_digests, used_names
from nightshift.registry.bases import base_digest
from nightshift.registry.lineage import open_lineage
from nightshift.registry.start import Start, find_misfits
from nightshift.registry.versions import (
    DIGEST,
    FORGOTTEN,
    fetch_adapter,
    find_alias,
    find_version,
    open_registry,
    read_reference,
)

log = logging.getLogger(__name__)


def update_start() -> None:
    """Write the record of the start, and if it is a version, its model and the examples it was trained on.

    Raises:
        ConfigError: The section `sft` does not fit the version's model.
        GateError: The version is not in the registry as it was registered.
    """
    params = read_params()
    if params["sft"]["start_from"] == "base":
        start = Start()
    else:
        start = find_start(RAW)
        log.info(
            "training starts from %s",
            f"version {start.version}" if start.version else f"the base: {start.reason}",
        )
    if start.version is None:
        shutil.rmtree(START, ignore_errors=True)
    else:
        fetch(start.version)
        # Another base is to come, on which training starts from the base.
        if start.base_model == params["base"]["model"] and (
            found := list(find_misfits(START_MODEL, start.version, params["sft"]))
        ):
            raise config_error(found)
    write_json(START_RECORD, asdict(start))


def fetch(version: int) -> None:
    """Download the model of a version, unless it is already there, and the list of its examples."""
    client, name = open_registry()
    fetch_adapter(find_version(client, name, version), START_MODEL)
    with open_lineage(name, version, START_ROWS.name) as rows:
        shutil.copyfile(rows, START_ROWS)


def find_start(raw: Path) -> Start:
    """Return where training starts on the shards in use.

    Raises:
        GateError: A version has no lineage, or was deleted.
    """
    client, name = open_registry()
    version = find_alias(client, name, "champion")
    if version is None:
        return Start(reason="there was no champion yet")
    lineage = read_lineage(version)
    start = describe(version) if has_new_shard(raw, lineage) else read_own_start(version, lineage)
    while start.version is not None:
        version = find_version(client, name, start.version)
        if FORGOTTEN not in version.tags:
            break
        reason = f"{version.tags[FORGOTTEN]} examples of version {start.version} were forgotten"
        start = read_own_start(version, read_lineage(version))
        if start.version is None:
            start = Start(reason=reason)
    return start


def read_lineage(version: ModelVersion) -> dict[str, Any]:
    """Read lineage.json of a version."""
    with open_lineage(version.name, int(version.version), "lineage.json") as file:
        known: dict[str, Any] = read_json(file)
    return known


def has_new_shard(raw: Path, lineage: Mapping[str, Any]) -> bool:
    """Return whether a shard in use was not in use when a version was trained.

    A shard that was rewritten since, when rows were forgotten, is not new.
    """
    known = {shard["sha256"] for shard in lineage["shards"]}
    digests, before = read_digests(raw), read_forgotten(raw).shards
    return any(known.isdisjoint([digests[name], *before.get(name, ())]) for name in used_names(raw, digests))


def describe(version: ModelVersion) -> Start:
    """Return the start at a version."""
    reference = read_reference(version)
    base = base_digest(reference["files"])
    return Start(int(version.version), version.tags[DIGEST], base, reference["model"])


def read_own_start(version: ModelVersion, lineage: Mapping[str, Any]) -> Start:
    """Return where the training of a version started, as its snapshot chose; the reason stays the same."""
    start = Start(**lineage.get("start", {}))
    if start == Start():
        return Start(reason=f"version {version.version} was trained on the same data, from the base")
    return start
