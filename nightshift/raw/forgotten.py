"""Rows that were taken out of the raw data: which, and how to know them when they are offered again."""

from dataclasses import dataclass, field
from pathlib import Path

from nightshift.core.files import read_json, write_json

# Below data/raw.
FORGOTTEN = "forgotten.json"


@dataclass(slots=True)
class Forgotten:
    """What `nightshift forget` took out. None of it holds text.

    Attributes:
        rows: Origins, `source/arrival.suffix:number`; what stands there now is no row.
        contents: Digests of what the rows said; a new shard is rid of rows that say it again.
        shards: Name of a shard -> its SHA-256 before rows were taken out; such a file does not come in again.
    """

    rows: set[str] = field(default_factory=set)
    contents: set[str] = field(default_factory=set)
    shards: dict[str, list[str]] = field(default_factory=dict)


def read_forgotten(raw: Path) -> Forgotten:
    """Read what was taken out of the shards below a folder."""
    path = raw / FORGOTTEN
    if not path.is_file():
        return Forgotten()
    known = read_json(path)
    return Forgotten(set(known["rows"]), set(known["contents"]), known["shards"])


def write_forgotten(raw: Path, forgotten: Forgotten) -> None:
    """Write what was taken out."""
    rows, contents = sorted(forgotten.rows), sorted(forgotten.contents)
    write_json(raw / FORGOTTEN, {"rows": rows, "contents": contents, "shards": forgotten.shards})
