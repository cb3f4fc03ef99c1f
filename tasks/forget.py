"""Delete rows from the raw data and from everything derived from it.

Deleted for good: the bytes in the shard, the old shard in DVC's cache and remotes, every DVC output
derived from it, caches and checkpoints, and the MLflow reports that show the rows. The shard keeps its
name and its other rows keep their numbers, so no other example gets a new id. `data/raw/forgotten.json`
keeps digests, which identify the rows when a source offers them again. Adapters trained on the rows stay
in the registry, tagged, until better ones replace them: a row cannot be removed from weights.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import escape
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from nightshift.core.errors import DataError
from nightshift.core.files import iterate_rows, read_rows
from nightshift.core.paths import INGESTED, PAGE, RAW, REMOVED
from nightshift.core.state import state_dir
from nightshift.pipeline.dvc_cache import md5, purge, record
from nightshift.pipeline.graph import outputs, read_stages, reads, stage_order
from nightshift.raw.erase import content_digest, conversations, forget_rows
from nightshift.raw.forgotten import read_forgotten
from nightshift.raw.shards import find_shards
from nightshift.raw.turns import Conversation
from nightshift.registry.lineage import open_lineage
from nightshift.registry.versions import FORGOTTEN, registered
from nightshift.tracking.runs import experiment_id

# Leading characters of a turn that a report always shows.
SHOWN = 200


@dataclass(frozen=True, slots=True)
class Found:
    """Rows to delete, and the model versions trained on them.

    Attributes:
        origins: Origins of the rows and of their near-duplicates, `source/arrival.suffix:number`.
        versions: Version number -> number of its examples that came from these rows.
    """

    origins: list[str]
    versions: dict[int, int]


def find(wanted: Sequence[str], client: MlflowClient, name: str) -> Found:
    """Find rows, their duplicates, and the model versions trained on any of them.

    Args:
        wanted: Ids of examples, or origins (`source/shard:number`).
        client: MLflow client.
        name: Name of the registered model.

    Raises:
        DataError: An id or origin does not exist.
    """
    trained = {int(one.version): trained_on(name, one) for one in registered(client, name)}
    examples = list(iterate_pairs(INGESTED)) if INGESTED.is_file() else []
    known = {*examples, *chain.from_iterable(trained.values())}
    meant = {one: {pair for pair in known if one in pair} for one in wanted}
    if missing := [one for one, pairs in meant.items() if not pairs and not is_place(one)]:
        raise DataError(
            f"{', '.join(missing)}: no example has this id, and no row this place (source/shard:number); "
            "`nightshift trace --row` shows both"
        )
    pairs = set().union(*meant.values())
    origins = {origin for _, origin in pairs} | {one for one in wanted if is_place(one)}
    removed = read_rows(REMOVED) if REMOVED.is_file() else []
    same = duplicates({one for one, _ in pairs}, removed)
    origins |= {origin for one, origin in examples if one in same}
    origins |= copies(origins)
    counts = {number: sum(origin in origins for _, origin in of) for number, of in trained.items()}
    return Found(sorted(origins), {number: count for number, count in counts.items() if count})


def is_place(text: str) -> bool:
    """Return whether a text is the origin of a row in an existing shard."""
    shard, _, number = text.rpartition(":")
    return bool(shard) and (RAW / shard).is_file() and number.isdecimal()


def duplicates(ids: Set[str], removed: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return these examples and all that deduplication merged with them, which would replace them.

    Example:
        >>> found = duplicates({"b"}, [{"id": "b", "kept_id": "a"}, {"id": "c", "kept_id": "a"}])
        >>> sorted(found)
        ['a', 'b', 'c']
    """
    pairs = [(row["id"], row["kept_id"]) for row in removed]
    kept = {*ids, *(kept for one, kept in pairs if one in ids)}
    return kept | {one for one, by in pairs if by in kept}


def copies(origins: Set[str]) -> set[str]:
    """Return the origins of rows with the same content as these, in all shards, in use or not."""
    said = {content_digest(one) for _, _, one in said_by(origins)}
    return {
        f"{shard.relative_to(RAW).as_posix()}:{number}"
        for _, shard in find_shards(RAW)
        for number, one in conversations(shard)
        if content_digest(one) in said
    }


def said_by(origins: Iterable[str]) -> Iterator[tuple[str, int, Conversation]]:
    """Yield (shard, number, conversation) of the rows at these origins that contain a conversation."""
    for shard, numbers in by_shard(origins).items():
        yield from ((shard, number, one) for number, one in conversations(RAW / shard) if number in numbers)


def by_shard(origins: Iterable[str]) -> dict[str, set[int]]:
    """Return shard name -> row numbers, for the origins whose shard exists."""
    rows: dict[str, set[int]] = defaultdict(set)
    for origin in filter(is_place, origins):
        shard, _, number = origin.rpartition(":")
        rows[shard].add(int(number))
    return rows


def trained_on(name: str, version: ModelVersion) -> list[tuple[str, str]]:
    """Return (id, origin) of all examples that a version was trained on."""
    with open_lineage(name, int(version.version)) as folder:
        return list(iterate_pairs(folder / "rows.parquet"))


def iterate_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, origin) of each row in a file."""
    for row in iterate_rows(path, ["id", "origin"]):
        yield row["id"], row["origin"]


def erase(found: Found, client: MlflowClient, name: str) -> None:
    """Delete the rows everywhere. An interrupted call can be repeated.

    Raises:
        StageError: DVC is running in this checkout.
    """
    rows = by_shard(found.origins)
    said = [one for _, _, one in said_by(found.origins)]
    remove_pages(client, said)
    purge({md5(RAW / shard) for shard in rows})
    forgotten = read_forgotten(RAW)
    forgotten.rows.update(found.origins)
    forgotten.contents.update(map(content_digest, said))
    for shard, numbers in rows.items():
        forget_rows(RAW / shard, numbers, RAW, forgotten)
    record(RAW)
    remove_derivatives()
    for version, examples in found.versions.items():
        client.set_model_version_tag(name, str(version), FORGOTTEN, str(examples))


def remove_pages(client: MlflowClient, said: Sequence[Conversation]) -> None:
    """Delete the MLflow reports that show one of these conversations, matched by its last two turns."""
    texts = [[str(escape(turn.content[:SHOWN])) for turn in one.turns[-2:]] for one in said]
    token = None
    while token != "":
        runs = client.search_runs([experiment_id(client)], page_token=token)
        for run in runs:
            if PAGE.name in (one.path for one in client.list_artifacts(run.info.run_id)):
                files = get_artifact_repository(run.info.artifact_uri)
                page = Path(files.download_artifacts(PAGE.name)).read_text(encoding="utf-8")
                if any(all(text in page for text in turns) for turns in texts):
                    files.delete_artifacts(PAGE.name)
        token = runs.token or ""


def remove_derivatives() -> None:
    """Delete what this checkout derived from raw data: outputs, caches, checkpoints, rebuilds."""
    stages = read_stages()
    made: list[dict[str, Any]] = [{"outs": [RAW.as_posix()]}]
    for stage in stage_order():
        if any(reads(stages[stage], other) for other in made):
            made.append(stages[stage])
    gone = [PAGE.parent, *(Path(path) for stage in made[1:] for path in outputs(stage))]
    for path in (*gone, *(state_dir() / name for name in ("memo", "checkpoints", "reproduce"))):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
