"""Copy the registry with its models to a folder or an object store, and back.

A backup is a list of files, `backups/<moment>.json`, and their contents in `objects/<SHA-256>`, so each one
uploads only what is new. It has MLflow's database and artifacts, the kept bases, the newest report, and the
branches of the runs. It has neither DVC's files, which `dvc push` copies, nor Prefect's database, which may
have secrets; `nightshift up` makes a new one.
"""

import contextlib
import json
import logging
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.local import processes
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import file_digest, read_state, write_json
from nightshift.core.paths import PAGE, SHORT
from nightshift.core.state import ARTIFACTS, DATABASE, state_dir
from nightshift.pipeline.leases import find_process

BUNDLE = "runs.bundle"
FOLDERS, FILES = (ARTIFACTS, "bases"), (PAGE.name, SHORT.name, "scoreboard.json")
# In the state folder: when and where the last backup was made.
RECORD = "backup.json"
log = logging.getLogger(__name__)


def backup(url: str) -> str:
    """Make a backup, and return its name.

    Args:
        url: Folder, `s3://bucket/folder` or `gs://bucket/folder`; credentials come from the environment.

    Raises:
        ConfigError: There is nothing to back up.
        StageError: The place cannot be written.
    """
    if not (state_dir() / DATABASE).is_file():
        raise ConfigError(
            f"{state_dir()}: there is no {DATABASE}, so nothing to back up; run `nightshift run`"
        )
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    with tempfile.TemporaryDirectory() as temporary, store_errors(url):
        store, root = open_store(url)
        files = {name: (file_digest(path), path) for name, path in collect(Path(temporary))}
        for number, (digest, path) in enumerate(files.values()):
            target = f"{root}/objects/{digest}"
            # A killed backup may leave a part of a file.
            if not store.exists(target) or store.info(target)["size"] != path.stat().st_size:
                store.makedirs(f"{root}/objects", exist_ok=True)
                store.put_file(str(path), target)
            log.debug("%d of %d files", number + 1, len(files))
        store.makedirs(f"{root}/backups", exist_ok=True)
        listing = {name: digest for name, (digest, _) in files.items()}
        # Last: a backup exists when all of its files do.
        store.pipe_file(f"{root}/backups/{name}.json", json.dumps(listing, indent=2).encode())
    write_json(state_dir() / RECORD, {"name": name, "url": url})
    return name


def collect(temporary: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the files of a backup; of the database a copy, which servers do not change."""
    home = state_dir()
    copy = temporary / DATABASE
    with (
        contextlib.closing(sqlite3.connect(home / DATABASE)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    yield DATABASE, copy
    bundle = temporary / BUNDLE
    command = ["git", "bundle", "create", "--quiet", str(bundle), "--branches=runs/*"]
    # Without such a branch, or without git, there is none.
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        yield BUNDLE, bundle
    for path in (path for folder in FOLDERS for path in sorted((home / folder).rglob("*")) if path.is_file()):
        yield path.relative_to(home).as_posix(), path
    for path in (home / name for name in FILES if (home / name).is_file()):
        yield path.name, path


def restore(url: str) -> str:
    """Restore the newest backup into an empty state folder, and return its name.

    Every file is compared with its digest before any takes its place.

    Raises:
        ConfigError: The state folder has a registry, the servers run, or there is no backup.
        StageError: The place cannot be read, or a file in it is damaged.
    """
    home = state_dir()
    home.mkdir(parents=True, exist_ok=True)
    if any(map(find_process, processes.read_records(home).values())):
        raise ConfigError(f"{home}: the servers are running; run `nightshift down` first")
    if (home / DATABASE).exists():
        raise ConfigError(f"{home}: there is a registry already; move {home / DATABASE} away first")
    with tempfile.TemporaryDirectory(dir=home) as temporary, store_errors(url):
        store, root = open_store(url)
        found = sorted(store.glob(f"{root}/backups/*.json"))
        if not found:
            raise ConfigError(f"{url}: there is no backup; `nightshift backup --to {url}` makes one")
        listing: dict[str, str] = json.loads(store.cat_file(found[-1]))
        for name, digest in listing.items():
            target = Path(temporary, name)
            if not target.resolve().is_relative_to(Path(temporary).resolve()):
                raise StageError(f"{url}: {found[-1]} names {name}, outside the state folder; it was changed")
            target.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{root}/objects/{digest}", str(target))
            if (actual := file_digest(target)) != digest:
                raise StageError(
                    f"{url}: {name} has the SHA-256 {actual} instead of {digest}: it is damaged; remove "
                    f"{found[-1]} to restore the backup before"
                )
        fetch_branches(Path(temporary, BUNDLE))
        for part in sorted(Path(temporary).iterdir()):
            place = home / part.name
            shutil.rmtree(place, ignore_errors=True)
            part.replace(place)
    return Path(found[-1]).stem


def fetch_branches(bundle: Path) -> None:
    """Add the branches of the runs to this repository, and remove the file.

    Raises:
        StageError: Git refuses them.
    """
    if not bundle.is_file():
        return
    command = ["git", "fetch", "--quiet", str(bundle), "refs/heads/runs/*:refs/heads/runs/*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"the branches of the runs are not restored: {done.stderr.strip()}; clone again")
    bundle.unlink()


def describe_last() -> str:
    """Describe the last backup of this state folder."""
    known = read_state(state_dir() / RECORD)
    if not known:
        return "none; `nightshift backup --to URL` makes one"
    moment = datetime.strptime(known["name"], "%Y%m%dT%H%M%S%z").astimezone()
    return f"{moment:%a %Y-%m-%d %H:%M} in {known['url']}"


def open_store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    import fsspec

    store, root = fsspec.url_to_fs(url)
    return store, root.rstrip("/")


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn an error of a store in the block into one that names the place.

    Raises:
        StageError: The place cannot be reached, read or written.
    """
    try:
        yield
    except (ConfigError, StageError):
        raise
    except Exception as err:  # the stores' libraries have errors of their own
        text = " ".join(str(err).split())
        raise StageError(
            f"{url}: {type(err).__name__}: {text}; check the place, its credentials and the disk"
        ) from err
