"""Data on disk that params.yaml does not list: used neither for training nor for evaluation."""

from collections.abc import Collection, Iterator
from pathlib import Path

from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError
from nightshift.core.paths import BENCHMARKS, RAW
from nightshift.data.used import read_used


def unused_by_params() -> list[str]:
    """Describe the data that params.yaml does not list now; empty if the file cannot be read."""
    try:
        section = read_params().get("snapshot")
    except ConfigError:
        return []
    named = section if isinstance(section, dict) else {}
    return describe(named.get("sources") or (), named.get("benchmarks") or ())


def unused_by_snapshot() -> list[str]:
    """Describe the data that params.yaml did not list at the last snapshot."""
    return describe(read_used(RAW), read_used(BENCHMARKS))


def describe(sources: Collection[str], benchmarks: Collection[str]) -> list[str]:
    """Describe all other data on disk, such as `source notes: 2 shards, 9.1 MB`."""
    found = []
    for folder, files in others(RAW, sources):
        count = f"{len(files):,} shard{'s' if len(files) != 1 else ''}"
        found.append(f"source {folder.name}: {count}, {size(files)}")
    for folder, files in others(BENCHMARKS, benchmarks):
        found.append(f"benchmark {folder.name}: {size(files)}")
    return found


def others(root: Path, used: Collection[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the unused folders that contain files, with their files."""
    for folder in sorted(root.glob("[!.]*/")):
        files = [path for path in folder.glob("[!.]*") if path.is_file()]
        if files and folder.name not in used:
            yield folder, files


def size(files: Collection[Path]) -> str:
    """Format the total size of files in kB or MB."""
    kilobytes = sum(path.stat().st_size for path in files) / 1000
    return f"{kilobytes / 1000:,.1f} MB" if kilobytes >= 1000 else f"{kilobytes:,.1f} kB"
