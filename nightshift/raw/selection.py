"""Rows that a source contributes: within its limit, and without the faults of an outdated version."""

import json
import logging
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from nightshift.core.config import suggestion
from nightshift.core.errors import DataError
from nightshift.core.files import hash_share, text_digest
from nightshift.raw.columns import find_column
from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow
from nightshift.raw.options import SourceOptions, read_options
from nightshift.raw.pii import redact
from nightshift.raw.readers import read_shard
from nightshift.raw.streams import Limits
from nightshift.raw.tables import Numbered
from nightshift.raw.versions import outdated_shards

log = logging.getLogger(__name__)


class Selection:
    """The rows in use of all shards, which are read in order of arrival.

    Attributes:
        over_limit: Rows beyond the limit of their source, by source.
        mended: Bad rows of shards of which a newer version arrived, by source.
        grouped: Rows with a value of the source's `group_by` column, by source.
        ungrouped: Rows without one.
    """

    def __init__(self, raw: Path) -> None:
        """Prepare to read the shards in a folder."""
        self.over_limit: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.grouped: Counter[str] = Counter()
        self.ungrouped: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._keys: dict[str, list[str]] = {}
        self._within: Counter[str] = Counter()
        self._raw, self._outdated = raw, outdated_shards(raw)
        self._options: dict[str, SourceOptions] = {}

    def options(self, source: str) -> SourceOptions:
        """Return the options of a source."""
        if source not in self._options:
            self._options[source] = read_options(self._raw, source)
        return self._options[source]

    def is_mended(self, shard: str, result: object) -> bool:
        """Return whether the result is a fault of a shard of which a newer version arrived; count it."""
        found = isinstance(result, RowError) and shard in self._outdated
        if found:
            self.mended[shard.partition("/")[0]] += 1
        return found

    def complete(self, example: dict[str, Any], row: RawRow) -> None:
        """Set the group of an example, and the id if its source is exported again and again.

        That id depends on the content, not on the shard, so that an unchanged row is the same example in
        every export. Equal rows are numbered.
        """
        source = example["source"]
        example["group"] = self.group(row, source)
        if self.options(source).mode == "replace":
            content = text_digest(source, json.dumps(example["messages"]), example["tools"] or "")
            self._seen[content] += 1
            example["id"] = text_digest(content, str(self._seen[content]))

    def group(self, row: RawRow, source: str) -> str | None:
        """Return the group of a row, as `find_group`, and count whether it has one."""
        column = self.options(source).group_by
        if column is None:
            return None
        found = find_group(row, column)
        (self.ungrouped if found is None else self.grouped)[source] += 1
        if found is None:
            self._keys.setdefault(source, sorted(redact(key)[:40] for key in row))
        return found

    def require_groups(self) -> None:
        """Check that each source has a value of its `group_by` column in at least one row.

        Raises:
            DataError: A source has none.
        """
        for source in sorted(self.ungrouped.keys() - self.grouped.keys()):
            column, rows = str(self.options(source).group_by), self.ungrouped[source]
            raise DataError(
                f"snapshot.sources.{source}.group_by: none of {rows} rows has a value of {column!r}; "
                f"{suggestion(column, self._keys[source])}"
            )

    def counts(self) -> dict[str, Any]:
        """Return the counts for the summary, by name and source; those without rows are omitted."""
        named = {
            "rows_over_limit": self.over_limit,
            "rows_mended": self.mended,
            "rows_ungrouped": self.ungrouped,
        }
        return {name: dict(sorted(counts.items())) for name, counts in named.items() if +counts}

    def rows(self, shard: Path, limits: Limits) -> Numbered:
        """Yield (number, row or error) for the rows of a shard within the limit of its source.

        Raises:
            DataError: The shard is damaged or exceeds the limits, and no newer version of it arrived.
        """
        source, name = shard.parent.name, shard.relative_to(self._raw).as_posix()
        limit = self.options(source).limit
        try:
            for number, row in read_shard(shard, limits):
                if is_within(row, f"{name}:{number}", limit, self._within[source]):
                    self._within[source] += 1
                    yield number, row
                else:
                    self.over_limit[source] += 1
        except DataError as err:
            if not self.is_mended(name, RowError("malformed_json")):
                raise
            log.warning("%s; a newer version of the file arrived, so this is ignored", err)


def is_within(row: RawRow | RowError, origin: str, limit: float | None, before: int) -> bool:
    """Return whether a row is within the limit of its source.

    A share is chosen by the hash of the row's content, so a row stays chosen when others come or go; a row
    that cannot be read is chosen by its origin.

    Args:
        row: Row or fault.
        origin: Origin of the row.
        limit: Number of rows, or a share between 0 and 1; None for all.
        before: Rows of the source that were within the limit so far.
    """
    if limit is None or isinstance(limit, int):
        return limit is None or before < limit
    with suppress(RecursionError):
        content = origin if isinstance(row, RowError) else json.dumps(row, sort_keys=True, default=str)
        return hash_share(content) < limit
    return hash_share(origin) < limit


def find_group(row: RawRow, column: str) -> str | None:
    """Return the digest of a column's name and value; None if the row has no value there.

    The value itself could be personal data. Text and numbers that read the same are one value, as a CSV
    file has only text.

    Args:
        row: Row of the source.
        column: Name of a column, or keys with dots that lead into nested objects.

    Example:
        >>> find_group({"meta": {"id": 7}}, "meta.id") == find_group({"meta.id": "7"}, "meta.id")
        True
        >>> find_group({"meta": None}, "meta.id"), find_group({"id": ""}, "id")
        (None, None)
    """
    value = find_column(row, column)
    if value is None or value == "":
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text_digest(column, text.strip())
