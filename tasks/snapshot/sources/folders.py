"""Local files: a path, a folder, a glob, or a data set that `datasets` saved."""

import glob
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from nightshift.core.errors import DataError
from nightshift.core.files import read_json
from nightshift.core.state import user_path
from nightshift.raw.formats import READABLE, shard_suffix
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.splits import choose_split

CHUNK = 4 * 2**20
# Files of `Dataset.save_to_disk` and of Hub data sets that describe the data.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
# Unreadable files that a warning names.
SHOWN = 10
# A file that changed less than two seconds ago could change again without a new time stamp.
SETTLED_NS = 2_000_000_000
P = TypeVar("P", bound=PurePath)
log = logging.getLogger(__name__)


def local_offers(location: str, split: str | None = None) -> Iterator[Offer]:
    """Yield the files of a path, a folder or a glob, ordered by name.

    A path that exists is that file or folder, whatever characters it contains; otherwise it is a glob. Of a
    folder, all readable files below it are taken, and one warning names the others.

    Raises:
        DataError: No file matches, none can be read, or a split has to be chosen.
    """
    path, exists = resolve(location)
    found = [path] if exists else [Path(one) for one in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    files, others = set[Path](), set[Path]()
    for folder in filter(Path.is_dir, found):
        readable, rest = walk(folder)
        files.update(readable)
        others.update(rest)
    files.update(one for one in found if one.is_file() and one not in others)
    if others:
        ignore([one.as_posix() for one in others], location)
    root = (path if path.is_dir() else path.parent) if exists else fixed_part(path)
    names = {readable_name(one.relative_to(root)): one for one in files}
    suffixes = require_readable(names, location, is_empty_folder=any(map(Path.is_dir, found)))
    for name in choose_split(list(suffixes), split, location):
        file = names[name]
        yield Offer(suffixes[name], read_file(file), name, file_version(file), file.stat().st_mtime)


def resolve(location: str) -> tuple[Path, bool]:
    """Return the path with the home folder in place of `~`, and whether it exists.

    Raises:
        DataError: The user in `~user` does not exist.
    """
    if (path := Path(location)).parts[:1] != ("..",) and exists(path):
        return path, True
    try:
        path = user_path(location)
    except RuntimeError as err:
        raise DataError(f"snapshot.sources: {location}: no such user; write the whole path") from err
    return path, exists(path)


def exists(path: Path) -> bool:
    """Return whether a path exists; one that is too long or invalid does not."""
    try:
        path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False
    return True


def fixed_part(path: P) -> P:
    """Return the folder above the first component of a glob that is a pattern.

    Example:
        >>> fixed_part(PurePath("exports/2026-*/a.jsonl")).as_posix()
        'exports'
    """
    fixed = type(path)(path.anchor)
    for part in path.relative_to(path.anchor).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the readable and the unreadable files below a folder.

    Hidden files are left out, and what describes a data set that `datasets` saved. Links to folders are
    not followed: they count as unreadable.

    Raises:
        OSError: A folder cannot be read.
    """
    readable: list[Path] = []
    others: list[Path] = []
    for name, folders, files in os.walk(folder, onerror=_raise):
        here = Path(name)
        folders[:] = [one for one in folders if not one.startswith(".")]
        others += [here / one for one in folders if (here / one).is_symlink()]
        for path in (here / one for one in data_files(here, files)):
            (readable if shard_suffix(path.name) and path.is_file() else others).append(path)
    return readable, others


def data_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the names of the files of a folder that may contain data.

    In a folder that `Dataset.save_to_disk` wrote, these are the ones it lists: `datasets` also caches there.
    """
    if "state.json" in names and "dataset_info.json" in names:
        return [one["filename"] for one in read_json(folder / "state.json")["_data_files"]]
    return [one for one in names if not one.startswith(".") and one not in DESCRIPTIONS]


def require_readable(names: Iterable[str], location: str, *, is_empty_folder: bool = False) -> dict[str, str]:
    """Return name -> suffix of the files, sorted by name.

    Raises:
        DataError: There are no files, or ingest cannot read one of them.
    """
    found = {name: shard_suffix(name) for name in sorted(names)}
    if not found:
        problem = (
            f"contains no file that ingest can read; use {READABLE}"
            if is_empty_folder
            else ("matches no file; correct the path or glob")
        )
        raise DataError(f"snapshot.sources: {location} {problem}")
    for name, suffix in found.items():
        if suffix is None:
            raise DataError(f"snapshot.sources: {name}: unknown format; use {READABLE}, or a narrower glob")
    return {name: suffix for name, suffix in found.items() if suffix}


def ignore(names: Sequence[str], location: str) -> None:
    """Warn about the unreadable files of a folder."""
    shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    log.warning(
        "snapshot.sources: %s: %d file(s) are not data and are ignored: %s", location, len(names), shown
    )


def readable_name(path: Path) -> str:
    """Return a relative path as text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def read_file(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a local file."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def file_version(path: Path) -> str | None:
    """Return what changes whenever the bytes of a file change; None if it changed just now."""
    stat = path.stat()
    if time.time_ns() - stat.st_ctime_ns < SETTLED_NS:
        return None
    return f"file {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _raise(err: OSError) -> None:
    raise err
