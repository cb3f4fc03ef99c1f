"""What need not be computed twice: values by content, in SQLite, outside the graph.

Signatures, token ids and raw model answers are functions of a text and of a method. The key is the
text's digest; the method stands in the manifest, and another method empties the memo, loudly. A memo
only saves time: with an empty one every stage writes the same bytes, apart from answers that a model
gives differently each time.
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
    """One memo, open for reading and writing; safe to share between processes and to kill."""

    def __init__(self, name: str, manifest: Mapping[str, Any], folder: Path | None = None) -> None:
        """Open `<state>/memo/<name>.sqlite`.

        Args:
            name: Name of the memo.
            manifest: The method, JSON values: what a value depends on besides its key. If the memo was
                made by another method it is emptied, with a warning that names the difference.
            folder: Where it lies, instead of `<state>/memo`.
        """
        path = (folder or state_dir() / "memo") / f"{name}.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        # A lost last write costs one computation; the database stays whole.
        self._database.execute("PRAGMA synchronous=NORMAL")
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS memo (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
            )
            self._database.execute("CREATE TABLE IF NOT EXISTS manifest (text TEXT NOT NULL)")
            self._require_manifest(path, json.loads(json.dumps(manifest)))

    def __enter__(self) -> Self:
        """Return the open memo."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the memo."""
        self._database.close()

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return key -> value for the keys that are known."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            some = keys[start : start + KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            found.update(self._database.execute(f"SELECT key, value FROM memo WHERE key IN ({marks})", some))
        return found

    def write(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Keep values, all or none; a key that is known keeps its value."""
        with self._database:
            self._database.executemany(
                "INSERT INTO memo VALUES (?, ?) ON CONFLICT (key) DO NOTHING", sorted(values)
            )

    def _require_manifest(self, path: Path, manifest: dict[str, Any]) -> None:
        """Empty the memo if another method filled it."""
        row = self._database.execute("SELECT text FROM manifest").fetchone()
        known = json.loads(row[0]) if row else manifest
        if known != manifest:
            changed = sorted(k for k in known.keys() | manifest.keys() if known.get(k) != manifest.get(k))
            log.warning(
                "%s: made with another method, emptied; everything is computed again: %s",
                path,
                ", ".join(f"{key} was {known.get(key)!r}, is {manifest.get(key)!r}" for key in changed),
            )
            self._database.execute("DELETE FROM memo")
        self._database.execute("DELETE FROM manifest")
        self._database.execute("INSERT INTO manifest VALUES (?)", (json.dumps(manifest),))
