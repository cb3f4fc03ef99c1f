"""Delete rows from the raw data and from everything derived from it.

Deleted for good: the bytes in the shard, the old shard in DVC's cache and remotes, every DVC output
derived from it, caches and checkpoints, and the MLflow reports that show the rows. The shard keeps its
name and its other rows keep their numbers, so no other example gets a new id. `data/raw/forgotten.json`
keeps digests, which identify the rows when a source offers them again. Adapters trained on the rows stay
in the registry, tagged, until better ones replace them: a row cannot be removed from weights.
"""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import escape
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from nightshift.core.errors import DataError, StageError
from nightshift.core.files import iterate_rows, read_rows
from nightshift.core.paths import COMPARED, INGESTED, PAGE, RAW, REMOVED, SHORT, START, START_MODEL
from nightshift.core.state import WORKSPACES, state_dir
from nightshift.pipeline.dvc_cache import md5, purge, record
from nightshift.pipeline.graph import outputs, read_stages, reads, stage_order
from nightshift.pipeline.leases import lease_holder, leased_runs
from nightshift.pipeline.workspaces import BRANCHES, commit_results, newest_branch, newest_date, take_over
from nightshift.raw.erase import content_digest, conversations, forget_rows
from nightshift.raw.forgotten import read_forgotten
from nightshift.raw.repairs import arrange, repair
from nightshift.raw.shards import find_shards
from nightshift.raw.turns import Conversation
from nightshift.registry.lineage import open_lineage
from nightshift.registry.versions import FORGOTTEN, registered
from nightshift.tracking.runs import experiment_id

# Leading characters of a turn that a report always shows, without the spaces before them.
SHOWN = 150
# What may contain or show rows in the state folder.
STATE = ("memo", "checkpoints", "reproduce", WORKSPACES, "damaged", PAGE.name, SHORT.name)


@dataclass(frozen=True, slots=True)
class Affected:
    """Rows to delete, and the model versions trained on them.

    Attributes:
        origins: Origins of the rows and of their near-duplicates, `source/arrival.suffix:number`.
        versions: Version number -> number of its examples that came from these rows.
    """

    origins: list[str]
    versions: dict[int, int]


def find(wanted: Sequence[str], client: MlflowClient, name: str) -> Affected:
    """Find rows, their duplicates, and the model versions trained on any of them.

    The data of the checkout becomes that of the newest run of a deployment before.

    Args:
        wanted: Ids of examples, or origins (`source/shard:number`).
        client: MLflow client.
        name: Name of the registered model.

    Raises:
        DataError: An id or origin does not exist.
        StageError: A run is active, which could bring the rows back.
    """
    if active := [run for run in leased_runs() if lease_holder(run) != "dead"]:
        raise StageError(f"run {active[0]} is active; wait for it, or end it with `nightshift down`")
    take_over()
    trained = {int(one.version): read_trained_rows(name, one) for one in registered(client, name)}
    examples = [pair for path in (INGESTED, COMPARED) if path.is_file() for pair in iterate_pairs(path)]
    known = {*examples, *chain.from_iterable(trained.values())}
    matches = {text: {pair for pair in known if text in pair} for text in wanted}
    if missing := [text for text, pairs in matches.items() if not pairs and not is_origin(text)]:
        raise DataError(
            f"{', '.join(missing)}: no example with this id and no row at this origin (source/shard:number); "
            "`nightshift trace --row` shows both"
        )
    pairs = set().union(*matches.values())
    origins = {origin for _, origin in pairs} | {text for text in wanted if is_origin(text)}
    removed = read_rows(REMOVED) if REMOVED.is_file() else []
    same = find_duplicates({example for example, _ in pairs}, removed)
    origins |= {origin for example, origin in examples if example in same}
    origins |= find_copies(origins)
    counts = {number: sum(origin in origins for _, origin in rows) for number, rows in trained.items()}
    return Affected(sorted(origins), {number: count for number, count in counts.items() if count})


def is_origin(text: str) -> bool:
    """Return whether a text is the origin of a row in an existing shard."""
    shard, _, number = text.rpartition(":")
    return bool(shard) and (RAW / shard).is_file() and number.isdecimal()


def find_duplicates(ids: Set[str], removed: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return these examples and all that deduplication merged with them, which would replace them.

    Example:
        >>> found = find_duplicates({"b"}, [{"id": "b", "kept_id": "a"}, {"id": "c", "kept_id": "a"}])
        >>> sorted(found)
        ['a', 'b', 'c']
    """
    pairs = [(row["id"], row["kept_id"]) for row in removed]
    kept = {*ids, *(kept for one, kept in pairs if one in ids)}
    return kept | {one for one, by in pairs if by in kept}


def find_copies(origins: Set[str]) -> set[str]:
    """Return the origins of rows with the same content as these, in all shards, in use or not."""
    digests = {content_digest(conversation) for _, _, conversation in conversations_at(origins)}
    return {
        f"{shard.relative_to(RAW).as_posix()}:{number}"
        for _, shard in find_shards(RAW)
        for number, conversation in conversations(shard)
        if content_digest(conversation) in digests
    }


def conversations_at(origins: Iterable[str]) -> Iterator[tuple[str, int, Conversation]]:
    """Yield (shard, number, conversation) of the rows at these origins that contain a conversation."""
    for shard, numbers in group_by_shard(origins).items():
        for number, conversation in conversations(RAW / shard):
            if number in numbers:
                yield shard, number, conversation


def group_by_shard(origins: Iterable[str]) -> dict[str, set[int]]:
    """Return shard name -> row numbers, for the origins whose shard exists."""
    rows: dict[str, set[int]] = defaultdict(set)
    for origin in filter(is_origin, origins):
        shard, _, number = origin.rpartition(":")
        rows[shard].add(int(number))
    return rows


def read_trained_rows(name: str, version: ModelVersion) -> list[tuple[str, str]]:
    """Return (id, origin) of all examples that a version was trained on."""
    with open_lineage(name, int(version.version)) as folder:
        return list(iterate_pairs(folder / "rows.parquet"))


def iterate_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, origin) of each row in a file."""
    for row in iterate_rows(path, ["id", "origin"]):
        yield row["id"], row["origin"]


def erase(found: Affected, client: MlflowClient, name: str) -> None:
    """Delete the rows everywhere. An interrupted call can be repeated.

    Raises:
        StageError: DVC is running in this checkout.
    """
    rows = group_by_shard(found.origins)
    erased = [conversation for _, _, conversation in conversations_at(found.origins)]
    remove_pages(client, erased)
    purge({md5(RAW / shard) for shard in rows})
    forgotten = read_forgotten(RAW)
    forgotten.rows.update(found.origins)
    forgotten.contents.update(map(content_digest, erased))
    for shard, numbers in rows.items():
        forget_rows(RAW / shard, numbers, RAW, forgotten)
    record(RAW)
    remove_derivatives()
    if newest_branch(here := Path.cwd()):
        branch = f"{BRANCHES}/{date.today():%Y-%m-%d}-forget-{len(forgotten.rows)}"
        commit_results(branch, "Rows were forgotten", newest_date(here))
    for version, examples in found.versions.items():
        client.set_model_version_tag(name, str(version), FORGOTTEN, str(examples))


def remove_pages(client: MlflowClient, erased: Sequence[Conversation]) -> None:
    """Delete the MLflow reports that show one of these conversations, matched by its last two turns."""
    # A page shows the rows as they were repaired then.
    shown = [arrange(repair(one, fix_encoding=fix)) for one in erased for fix in (False, True)]
    texts = [[str(escape(turn.content.strip()[:SHOWN])) for turn in one.turns[-2:]] for one in shown]
    token = None
    while token != "":
        runs = client.search_runs([experiment_id(client)], page_token=token)
        for run in runs:
            if PAGE.name in (one.path for one in client.list_artifacts(run.info.run_id)):
                files = get_artifact_repository(run.info.artifact_uri)
                with tempfile.TemporaryDirectory() as folder:
                    page = Path(files.download_artifacts(PAGE.name, folder)).read_text(encoding="utf-8")
                if any(all(text in page for text in turns) for turns in texts):
                    files.delete_artifacts(PAGE.name)
        token = runs.token or ""


def remove_derivatives() -> None:
    """Delete what this checkout derived from raw data: outputs, caches, checkpoints, rebuilds."""
    stages = read_stages()
    derived: list[dict[str, Any]] = [{"outs": [RAW.as_posix()]}]
    for stage in stage_order():
        if any(reads(stages[stage], other) for other in derived):
            derived.append(stages[stage])
    targets = [PAGE.parent, *(Path(path) for stage in derived[1:] for path in outputs(stage))]
    if START_MODEL.is_dir():
        # The version from which training starts may have been trained on them: the snapshot chooses again.
        targets.append(START)
    for path in (*targets, *(state_dir() / name for name in STATE)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
