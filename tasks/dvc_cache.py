"""What goes into DVC's cache, and what has to leave it for good."""

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from tasks.errors import StageError
from tasks.files import read_json

log = logging.getLogger(__name__)


def add(folder: Path) -> None:
    """Put a folder under DVC's control (`<folder>.dvc`); nothing happens if it did not change.

    Raises:
        StageError: DVC refuses; its message is passed on.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StageError(f"dvc add {folder} failed: {done.stderr.strip()}; see `dvc doctor`")


def purge(shards: Set[str]) -> None:
    """Remove shards, and every output that DVC made of them, from its cache and its remotes.

    Args:
        shards: MD5 of each, in hex: the name that DVC knows it by.

    Raises:
        StageError: DVC is at work in this checkout.
    """
    from dvc.lock import LockError  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]

    with Repo() as repo:
        cache = repo.cache.local
        try:
            with repo.lock:
                runs = list(read_runs(Path(repo.stage_cache.cache_dir)))
                within = {
                    oid: listing(Path(cache.oid_to_path(oid))) for run in runs for oid in run.deps | run.outs
                }
                bad = affected(runs, {oid for oid, files in within.items() if files & shards})
                kept = set().union(*(within[oid] | {oid} for run in runs for oid in run.outs - bad))
                gone = shards | set().union(*(within[oid] | {oid} for oid in bad)) - kept
                for store in (
                    cache,
                    *(repo.cloud.get_remote_odb(remote) for remote in repo.config["remote"]),
                ):
                    for oid in filter(store.exists, sorted(gone)):
                        store.delete(oid)
        except LockError as err:
            raise StageError("DVC is at work in this checkout; wait for the run, or cancel it") from err
    log.info("%d outputs in DVC's cache were made of these shards, and are gone", len(bad))


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a stage read and wrote: DVC's digests of the paths."""

    deps: frozenset[str]
    outs: frozenset[str]


def read_runs(folder: Path) -> Iterator[Run]:
    """Yield all runs that DVC remembers."""
    for path in folder.glob("*/*/*"):
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        deps, outs = ({one["md5"] for one in run.get(key, ())} for key in ("deps", "outs"))
        yield Run(frozenset(deps), frozenset(outs))


def affected(runs: Sequence[Run], start: Set[str]) -> set[str]:
    """Return all outputs that were made of something, directly or not.

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
    """Return the digests of the files in a folder that DVC keeps; none for a file, or what is not there."""
    if path.suffix != ".dir" or not path.is_file():
        return set()
    return {entry["md5"] for entry in read_json(path)}


def md5(path: Path) -> str:
    """MD5 of a file's bytes, in hex, as DVC names them."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
