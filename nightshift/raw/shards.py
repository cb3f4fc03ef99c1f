"""Shards in data/raw, in arrival order, as the snapshot wrote them."""

import re
from pathlib import Path

from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json
from nightshift.data.used import read_used
from nightshift.raw.formats import READABLE, shard_suffix

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
    """Return (arrival, path) of the shards of all sources in use, in arrival order.

    Raises:
        DataError: A file is not a shard.
    """
    used = read_used(raw)
    return [(arrival, path) for arrival, path in find_shards(raw) if path.parent.name in used]


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
