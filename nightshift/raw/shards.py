"""Shards in data/raw, in arrival order, as the snapshot wrote them."""

import re
from collections.abc import Iterable
from pathlib import Path

from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json
from nightshift.data.used import read_used
from nightshift.raw.formats import READABLE, shard_suffix
from nightshift.raw.versions import read_exports

# In data/raw: name of each shard -> SHA-256 of its bytes.
DIGESTS = "digests.json"


def find_shards(raw: Path) -> list[tuple[int, Path]]:
    """Return (arrival, path) of all shards, in arrival order.

    Raises:
        DataError: A file is not a shard.
    """
    found = []
    for path in raw.glob("*/[!.]*"):
        suffix = shard_suffix(path.name)
        stem = path.name.removesuffix(suffix or "")
        if suffix is None or not re.fullmatch(r"\d{1,9}", stem):
            raise DataError(f"{path}: not a shard: its name is not a number with {READABLE}; remove it")
        found.append((int(stem), path))
    return sorted(found, key=lambda shard: (shard[0], shard[1].parent.name))


def used_shards(raw: Path) -> list[tuple[int, Path]]:
    """Return (arrival, path) of the shards in use, in arrival order.

    The newest export of a source in mode `replace` has the place of the source's first shard, so its rows
    stay earlier than the same rows of other sources.

    Raises:
        DataError: A file is not a shard.
    """
    found = {path.relative_to(raw).as_posix(): (arrival, path) for arrival, path in find_shards(raw)}
    exports, places = read_exports(raw), dict[str, int]()
    for name, (arrival, _) in found.items():
        places.setdefault(name.partition("/")[0], arrival)

    def place(name: str) -> tuple[int, int]:
        source, arrival = name.partition("/")[0], found[name][0]
        return places[source] if source in exports else arrival, arrival

    return [found[name] for name in sorted(used_names(raw, found), key=place)]


def used_names(raw: Path, names: Iterable[str]) -> list[str]:
    """Return the names of the shards in use, in their order.

    These are the shards of the sources in params.yaml, except those that a newer export replaced.
    """
    used, exports = read_used(raw), read_exports(raw)
    sources = ((name, name.partition("/")[0]) for name in names)
    return [name for name, source in sources if source in used and name in exports.get(source, (name,))]


def read_digests(raw: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the shards from the snapshot; manually added ones are not listed."""
    path = raw / DIGESTS
    listed: dict[str, str] = read_json(path) if path.is_file() else {}
    return listed


def require_digest(path: Path, expected: str | None) -> None:
    """Check that a shard has not changed since the snapshot.

    Raises:
        DataError: The bytes have changed.
    """
    if expected and file_digest(path) != expected:
        raise DataError(f"{path}: changed after it arrived; restore it (`dvc checkout`) or remove it")
