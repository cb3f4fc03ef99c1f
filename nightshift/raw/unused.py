"""Data that stays on disk, although params.yaml does not name it: neither trained on nor asked."""

from collections.abc import Collection, Iterator
from pathlib import Path

from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError
from nightshift.core.paths import BENCHMARKS, RAW
from nightshift.data.used import read_used


def unused_by_params() -> list[str]:
    """Describe what params.yaml does not name now; nothing if the file cannot be read."""
    try:
        section = read_params().get("snapshot")
    except ConfigError:
        return []
    named = section if isinstance(section, dict) else {}
    return describe(named.get("sources") or (), named.get("benchmarks") or ())


def unused_by_snapshot() -> list[str]:
    """Describe what params.yaml did not name when the last snapshot was taken."""
    return describe(read_used(RAW), read_used(BENCHMARKS))


def describe(sources: Collection[str], benchmarks: Collection[str]) -> list[str]:
    """Describe what is on disk beside these, such as `source notes: 2 shards, 9.1 MB`."""
    found = []
    for folder, files in others(RAW, sources):
        count = f"{len(files):,} shard{'s' if len(files) != 1 else ''}"
        found.append(f"source {folder.name}: {count}, {size(files)}")
    for folder, files in others(BENCHMARKS, benchmarks):
        found.append(f"benchmark {folder.name}: {size(files)}")
    return found


def others(root: Path, used: Collection[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the folders with files that are not in use, and their files."""
    for folder in sorted(root.glob("[!.]*/")):
        files = [path for path in folder.glob("[!.]*") if path.is_file()]
        if files and folder.name not in used:
            yield folder, files


def size(files: Collection[Path]) -> str:
    """Say how large files are together, in kB or MB."""
    kilobytes = sum(path.stat().st_size for path in files) / 1000
    return f"{kilobytes / 1000:,.1f} MB" if kilobytes >= 1000 else f"{kilobytes:,.1f} kB"
