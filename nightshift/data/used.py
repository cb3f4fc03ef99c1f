"""Which sources and benchmarks count: those that params.yaml names.

The snapshot writes their names beside the data, so that the stages which read it follow params.yaml without
reading it: equal files give equal files. What is not named stays on disk until it is named again.
"""

from collections.abc import Iterable
from pathlib import Path

from nightshift.core.files import read_json, write_json

# Below data/raw and data/benchmarks.
USED = "used.json"


def write_used(folder: Path, names: Iterable[str]) -> None:
    """Write which of the folders below `folder` count."""
    write_json(folder / USED, sorted(names))


def read_used(folder: Path) -> set[str]:
    """Return the names that count; without a list, as beside data put there by hand, those of all folders."""
    path = folder / USED
    return set(read_json(path)) if path.is_file() else {one.name for one in folder.glob("[!.]*/")}
