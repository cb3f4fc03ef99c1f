"""Sources and benchmarks in use: those listed in params.yaml.

The snapshot writes their names next to the data, so the stages that read the data follow params.yaml
without depending on it. Data that is not listed stays on disk until it is listed again.
"""

from collections.abc import Iterable
from pathlib import Path

from nightshift.core.files import read_json, write_json

# In data/raw and data/benchmarks.
USED = "used.json"


def write_used(folder: Path, names: Iterable[str]) -> None:
    """Write the names of the folders in `folder` that are in use."""
    write_json(folder / USED, sorted(names))


def read_used(folder: Path) -> set[str]:
    """Return the names in use; without used.json (manually added data), all folders."""
    path = folder / USED
    return set(read_json(path)) if path.is_file() else {one.name for one in folder.glob("[!.]*/")}
