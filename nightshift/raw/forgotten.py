"""Rows erased from the raw data, and how to recognize them when they arrive again."""

from dataclasses import dataclass, field
from pathlib import Path

from nightshift.core.files import read_json, write_json

# In data/raw.
FORGOTTEN = "forgotten.json"


@dataclass(slots=True)
class Forgotten:
    """Rows erased by `nightshift forget`. Contains no text.

    Attributes:
        rows: Origins of the rows, `source/arrival.suffix:number`; a placeholder is left there.
        contents: Digests of the erased contents; matching rows are erased from new shards.
        shards: Shard name -> SHA-256 before rows were erased; such files are not imported again.
    """

    rows: set[str] = field(default_factory=set)
    contents: set[str] = field(default_factory=set)
    shards: dict[str, list[str]] = field(default_factory=dict)


def read_forgotten(raw: Path) -> Forgotten:
    """Read the record of erased rows of the shards in a folder."""
    path = raw / FORGOTTEN
    if not path.is_file():
        return Forgotten()
    known = read_json(path)
    return Forgotten(set(known["rows"]), set(known["contents"]), known["shards"])


def write_forgotten(raw: Path, forgotten: Forgotten) -> None:
    """Write the record of erased rows."""
    rows, contents = sorted(forgotten.rows), sorted(forgotten.contents)
    write_json(raw / FORGOTTEN, {"rows": rows, "contents": contents, "shards": forgotten.shards})
