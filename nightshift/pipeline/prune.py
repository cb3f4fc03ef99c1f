"""Remove from the state folder what no later run needs, by age and size; the registry and branches stay."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nightshift.core.state import WORKSPACES, state_dir
from nightshift.pipeline.leases import lease_holder, leased_runs

# A failed run's workspace is kept this long, and what `nightshift reproduce` rebuilt.
KEPT_DAYS = 7
# Trainings whose checkpoints are kept; one that changed within a day may be active.
TRAININGS, ACTIVE_DAYS = 5, 1
# Cached scores, signatures and tokens; they are computed again if they are needed later.
SCORES_DAYS = 90
LOG_MIB = 64
log = logging.getLogger(__name__)


def prune() -> None:
    """Remove old workspaces, checkpoints, rebuilds and cached scores, and shorten long logs.

    Whatever cannot be removed stays until the next time.
    """
    home = state_dir()
    for path in (*old_workspaces(home), *old_checkpoints(home), *old_files(home)):
        attempt(lambda path=path: remove(path), path)  # type: ignore[misc]
    for path in (home / "logs").glob("*.log"):
        attempt(lambda path=path: shorten(path), path)  # type: ignore[misc]


def attempt(act: Callable[[], None], path: Path) -> None:
    """Act on a path; a failure is only logged."""
    try:
        act()
    except OSError as err:
        log.warning("%s stays: %s", path, err)


def old_workspaces(home: Path) -> Iterator[Path]:
    """Yield the workspaces of failed runs after `KEPT_DAYS`, but none in which a run is active."""
    active = {run[:8] for run in leased_runs() if lease_holder(run) != "dead"}
    for folder in (home / WORKSPACES).glob("*"):
        if age(folder) > KEPT_DAYS and folder.name[-8:] not in active:
            yield folder


def old_checkpoints(home: Path) -> Iterator[Path]:
    """Yield the folders of all trainings but the newest; a registered version needs none."""
    folders = sorted((home / "checkpoints").glob("*"), key=age)
    yield from (folder for folder in folders[TRAININGS:] if age(folder) > ACTIVE_DAYS)


def old_files(home: Path) -> Iterator[Path]:
    """Yield rebuilds and cached scores that are old, and caches to which nothing was added for long."""
    yield from (path for path in (home / "reproduce").glob("*") if age(path) > KEPT_DAYS)
    yield from (path for path in (home / "memo" / "scores").glob("*") if age(path) > SCORES_DAYS)
    for path in (home / "memo").glob("*.sqlite"):
        # SQLite's log and index are next to it. Replies of a model cost money, and may differ next time.
        files = list(path.parent.glob(f"{path.name}*"))
        if path.stem != "replies" and min(map(age, files)) > SCORES_DAYS:
            yield from files


def age(path: Path) -> float:
    """Return for how many days neither a path nor what is directly in it has changed."""
    paths = [path, *(path.iterdir() if path.is_dir() else ())]
    # A file may vanish meanwhile.
    newest = max(
        (one.lstat().st_mtime for one in paths if one.is_symlink() or one.exists()), default=time.time()
    )
    return (time.time() - newest) / 86_400


def remove(path: Path) -> None:
    """Remove a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    log.info("%s was removed: old", path)


def shorten(path: Path) -> None:
    """Move the content of a long log to `.log.1`; the service goes on writing to the same file."""
    if path.stat().st_size > LOG_MIB * 2**20:
        shutil.copyfile(path, path.with_suffix(".log.1"))
        os.truncate(path, 0)
