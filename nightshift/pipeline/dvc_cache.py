"""Restore outputs from DVC's cache, and remove outputs from it permanently."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nightshift.core.errors import StageError
from nightshift.core.files import read_json
from nightshift.core.state import state_dir
from nightshift.pipeline.graph import LOCK, locked_outputs

log = logging.getLogger(__name__)


def restore(folder: Path) -> None:
    """Restore a missing output of the snapshot that dvc.lock lists, as in a fresh clone.

    Without it, the stage would start over and lose data that its sources no longer offer.

    Raises:
        StageError: Neither the cache nor a remote contains all of it, or what they contain is damaged.
    """
    recorded = locked_outputs().get("snapshot", {}).get(folder.as_posix())
    if folder.exists() or recorded is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as incoming:
        # `dvc pull` would wait for the running stage, which calls this.
        command = ["dvc", "get", ".", str(folder), "--out", f"{incoming}/{folder.name}"]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = "".join(line for line in done.stderr.splitlines() if line.startswith("ERROR: "))
            raise StageError(
                f"{folder}: {LOCK} lists it, but neither DVC's cache nor its remote contains all of it "
                f"({reason.removeprefix('ERROR: ')}); add the remote that contains it to .dvc/config, or "
                f"remove {LOCK} to start without it"
            )
        # Unlike `dvc pull`, `dvc get` never verifies what it downloads.
        if (found := digest(Path(incoming, folder.name))) != recorded:
            raise StageError(
                f"{folder}: {LOCK} lists it with digest {recorded}, but DVC's cache or remote has it with "
                f"{found}: a file there is damaged; replace it with the file of the same name in .dvc/cache "
                f"of a clone that has it (`dvc pull -v {folder}` names it)"
            )
        Path(incoming, folder.name).replace(folder)
    log.info("%s: restored from %s", folder, LOCK)


def record(folder: Path) -> None:
    """Add a changed output of the snapshot to the cache and to dvc.lock.

    `dvc commit` would also record the current parameters and code, with which the stage has not run yet.

    Raises:
        StageError: DVC is running in this checkout.
    """
    if folder.as_posix() not in locked_outputs().get("snapshot", {}):
        return
    with locked_repo() as repo:
        stage = repo.stage.load_one(name="snapshot")
        (out,) = (out for out in stage.outs if out.def_path == folder.as_posix())
        out.save()
        stage.commit(filter_info=out.fs_path)
        stage.dump(update_pipeline=False)


@contextmanager
def locked_repo() -> Iterator[Any]:
    """Yield DVC's repository while holding its lock.

    Raises:
        StageError: DVC is running in this checkout.
    """
    from dvc.lock import LockError  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]

    with Repo() as repo:
        try:
            with repo.lock:
                yield repo
        except LockError as err:
            raise StageError("DVC is running in this checkout; wait for the run, or cancel it") from err


def purge(shards: Set[str]) -> None:
    """Remove shards, and every output derived from them, from DVC's cache and its remotes.

    Args:
        shards: MD5 of each shard, in hex, as used by DVC.

    Raises:
        StageError: DVC is running in this checkout.
    """
    with locked_repo() as repo:
        cache = repo.cache.local
        runs = list(read_runs(Path(repo.stage_cache.cache_dir)))
        within = {oid: listing(Path(cache.oid_to_path(oid))) for run in runs for oid in run.deps | run.outs}
        bad = affected(runs, {oid for oid, files in within.items() if files & shards})
        kept = set().union(*(within[oid] | {oid} for run in runs for oid in run.outs - bad))
        gone = shards | set().union(*(within[oid] | {oid} for oid in bad)) - kept
        for store in (cache, *(repo.cloud.get_remote_odb(remote) for remote in repo.config["remote"])):
            for oid in filter(store.exists, sorted(gone)):
                store.delete(oid)
    log.info("DVC's cache: removed %d outputs derived from these shards", len(bad))


@dataclass(frozen=True, slots=True)
class Run:
    """Inputs and outputs of one stage run, as DVC's digests of the paths."""

    deps: frozenset[str]
    outs: frozenset[str]


def read_runs(folder: Path) -> Iterator[Run]:
    """Yield all runs in DVC's run cache."""
    for path in folder.glob("*/*/*"):
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        deps, outs = ({one["md5"] for one in run.get(key, ())} for key in ("deps", "outs"))
        yield Run(frozenset(deps), frozenset(outs))


def affected(runs: Sequence[Run], start: Set[str]) -> set[str]:
    """Return all outputs derived from `start`, directly or indirectly.

    Example:
        >>> runs = [Run(frozenset("a"), frozenset("b")), Run(frozenset("bx"), frozenset("c"))]
        >>> sorted(affected(runs, {"a"})), sorted(affected(runs, {"x"}))
        (['b', 'c'], ['c'])
    """
    found: set[str] = set()
    while new := {out for run in runs if run.deps & (found | start) for out in run.outs} - found:
        found |= new
    return found


def listing(path: Path) -> set[str]:
    """Return the digests of the files in a cached folder; empty for a file or a missing path."""
    if path.suffix != ".dir" or not path.is_file():
        return set()
    return {entry["md5"] for entry in read_json(path)}


def mend(folder: Path, stages: Collection[str] | None = None) -> list[str]:
    """Check what DVC's cache has of the outputs in a dvc.lock, which DVC trusts; fetch damaged objects again.

    What neither a remote nor the current folder has is only removed: its stage runs again.

    Args:
        folder: Folder with the dvc.lock.
        stages: Stages to check; None for all.

    Returns:
        One line about each damaged object.
    """
    from dvc.repo import Repo

    locked = locked_outputs(folder / LOCK)
    outs = {
        oid: path
        for stage in locked
        if stages is None or stage in stages
        for path, oid in locked[stage].items()
    }
    with Repo(str(folder)) as repo:
        damaged = fetch_again(repo, outs)
        inside = {
            entry["md5"]: f"{path}/{entry['relpath']}"
            for oid, path in outs.items()
            if oid.endswith(".dir") and (file := Path(repo.cache.local.oid_to_path(oid))).is_file()
            for entry in read_json(file)
        }
        damaged |= fetch_again(repo, inside)
    return [
        f"{path}: DVC's cache had a damaged {oid}, {what}" for oid, (path, what) in sorted(damaged.items())
    ]


def fetch_again(repo: Any, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Remove the damaged ones of these objects from DVC's cache; fetch them from the remote or the folder.

    Args:
        repo: DVC's repository.
        names: Object -> path of the output.

    Returns:
        Damaged object -> (path, what became of it).
    """
    from dvc.exceptions import DvcException  # type: ignore[import-untyped]
    from dvc_data.hashfile.hash_info import HashInfo

    files = {oid: Path(repo.cache.local.oid_to_path(oid)) for oid in names}
    damaged = find_damaged(files)
    for oid in damaged:
        # It may be the only copy of data that no source offers any more.
        place = state_dir() / "damaged" / oid
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(files[oid], place)
    if damaged:
        # Not every object may be there, and the remote may be damaged, too, or away.
        with suppress(DvcException, OSError):
            repo.cloud.pull({HashInfo("md5", oid) for oid in damaged})
    for oid in find_damaged({oid: files[oid] for oid in damaged}):
        files[oid].unlink()
    for oid in damaged:
        copy = Path(names[oid])
        if not files[oid].is_file() and copy.is_file() and md5(copy) == oid:
            files[oid].parent.mkdir(exist_ok=True)
            shutil.copyfile(copy, files[oid])
            files[oid].chmod(0o444)
    fetched = {
        True: "which was fetched again",
        False: f"and no remote has it; it is in {state_dir() / 'damaged'}",
    }
    return {oid: (names[oid], fetched[files[oid].is_file()]) for oid in damaged}


def find_damaged(files: Mapping[str, Path]) -> list[str]:
    """Return the objects whose bytes do not have the MD5 that is their name; missing ones are left out."""
    existing = {oid: path for oid, path in files.items() if path.is_file()}
    # Hashing releases the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(existing, pool.map(md5, existing.values()), strict=True))
    return [oid for oid, known in found.items() if known != oid.removesuffix(".dir")]


def digest(path: Path) -> str:
    """Return the digest of a file or folder, as DVC records it in dvc.lock."""
    from dvc.fs import localfs  # type: ignore[import-untyped]
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build

    with Repo() as repo:
        _, _, found = build(repo.cache.local, str(path.absolute()), localfs, "md5", dry_run=True)
    return str(found.hash_info.value)


def md5(path: Path) -> str:
    """Return the MD5 of a file's bytes in hex, as DVC identifies it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
