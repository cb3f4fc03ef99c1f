"""Versions of the files of each source: which shard is the newest of a file, which are in use.

A file that changes at its source arrives again, as another shard. What happens to the older shard depends
on the source's mode. `append`: its good rows stay in use, and its bad rows no longer count. `replace`: the
newest export is the whole source, so every other shard is withdrawn: it stays on disk, but is not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nightshift.core.files import read_json, write_json

# In data/raw: source -> shards of each of its files, and those of its newest export.
VERSIONS = "versions.json"


@dataclass(slots=True)
class Versions:
    """Shards of one source.

    Attributes:
        files: Name of a file at the source -> names of its shards, the newest one last.
        export: Names of the shards of the newest export, if that is the whole source.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    export: list[str] | None = None

    def update(self, offered: Mapping[str, str]) -> None:
        """Record the shard that has the current bytes of each offered file.

        A new name for the bytes of another file is not recorded: an unchanged export with today's date in
        its name changes nothing.

        Example:
            >>> versions = Versions({"a": ["s/1"]})
            >>> versions.update({"a": "s/2", "b": "s/2", "c": "s/1"})
            >>> versions.files
            {'a': ['s/1', 's/2'], 'c': ['s/1']}
        """
        for file in offered.keys() & self.files.keys():
            earlier = [one for one in self.files[file] if one != offered[file]]
            self.files[file] = [*earlier, offered[file]]
        newest = {shards[-1] for shards in self.files.values()}
        for file, shard in offered.items():
            if file not in self.files and shard not in newest:
                self.files[file] = [shard]
                newest.add(shard)

    def outdated(self) -> set[str]:
        """Return the shards of which a newer version arrived: they are the newest of no file."""
        newest = {shards[-1] for shards in self.files.values()}
        return {shard for shards in self.files.values() for shard in shards} - newest


def read_versions(raw: Path) -> dict[str, Versions]:
    """Return source -> versions; sources of manually added data are not listed."""
    path = raw / VERSIONS
    listed = read_json(path) if path.is_file() else {}
    return {source: Versions(one["files"], one["export"]) for source, one in listed.items()}


def write_versions(raw: Path, versions: Mapping[str, Versions]) -> None:
    """Write the versions of all sources."""
    listed = {source: {"files": one.files, "export": one.export} for source, one in versions.items()}
    write_json(raw / VERSIONS, listed)


def read_exports(raw: Path) -> dict[str, list[str]]:
    """Return source -> shards of the newest export, of each source in mode `replace`."""
    return {source: one.export for source, one in read_versions(raw).items() if one.export is not None}


def outdated_shards(raw: Path) -> set[str]:
    """Return the names of the shards of which a newer version arrived."""
    return set().union(*(one.outdated() for one in read_versions(raw).values()))
