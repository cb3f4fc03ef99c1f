"""Caches of computed values by content, in SQLite, outside the DVC graph.

Signatures, token ids and raw model replies are functions of a text and a method. The key is the text's
digest. The manifest stores the method; a different method empties the cache with a warning. A cache only
saves time: with an empty one every stage writes the same bytes, except for model replies that differ
from call to call.
"""

import json
import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nightshift.core.state import state_dir

# SQLite binds at most 32,766 values in one statement.
KEYS_PER_QUERY = 10_000
log = logging.getLogger(__name__)


class Memo:
    """One cache, open for reading and writing; safe to share between processes and to kill."""

    def __init__(self, name: str, manifest: Mapping[str, Any], folder: Path | None = None) -> None:
        """Open `<state>/memo/<name>.sqlite`.

        Args:
            name: Cache name.
            manifest: Method, as JSON values: everything that a value depends on besides its key. If the
                stored manifest differs, the cache is emptied with a warning that lists the differences.
            folder: Folder of the cache file, instead of `<state>/memo`.
        """
        path = (folder or state_dir() / "memo") / f"{name}.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        # Losing the last write costs one recomputation; the database stays consistent.
        self._database.execute("PRAGMA synchronous=NORMAL")
        # 64 MiB. Keys come in no order, so each checkpoint writes most pages of the index to the disk.
        self._database.execute("PRAGMA wal_autocheckpoint=16384")
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute("CREATE TABLE IF NOT EXISTS manifest (text TEXT NOT NULL)")
            self._require_manifest(path, json.loads(json.dumps(manifest)))
            # WITHOUT ROWID would keep the values in the index, which takes three times as long to write.
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS memo (key TEXT PRIMARY KEY, value BLOB NOT NULL)"
            )

    def __enter__(self) -> Self:
        """Return the open cache."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the cache."""
        self._database.close()

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return key -> value for the cached keys."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            some = keys[start : start + KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            found.update(self._database.execute(f"SELECT key, value FROM memo WHERE key IN ({marks})", some))
        return found

    def write(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Store all values in one transaction; an existing key keeps its value."""
        with self._database:
            self._database.executemany(
                "INSERT INTO memo VALUES (?, ?) ON CONFLICT (key) DO NOTHING", sorted(values)
            )

    def _require_manifest(self, path: Path, manifest: dict[str, Any]) -> None:
        """Empty the cache if another method filled it."""
        row = self._database.execute("SELECT text FROM manifest").fetchone()
        known = json.loads(row[0]) if row else manifest
        if known != manifest:
            changed = sorted(k for k in known.keys() | manifest.keys() if known.get(k) != manifest.get(k))
            log.warning(
                "%s: the cache was filled by another method and was emptied; all values are recomputed: %s",
                path,
                ", ".join(f"{key} was {known.get(key)!r}, is {manifest.get(key)!r}" for key in changed),
            )
            self._database.execute("DROP TABLE IF EXISTS memo")
        self._database.execute("DELETE FROM manifest")
        self._database.execute("INSERT INTO manifest VALUES (?)", (json.dumps(manifest),))
