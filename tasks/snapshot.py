"""Bring the outside in, as files: new data, benchmarks, and the champion's identity.

Runs before the graph, never inside it. Sources (params.yaml) become immutable shards
`data/raw/<source>/<arrival>.jsonl`; a shard is written only when its bytes are new, so a night
without new data changes nothing. Benchmarks become `data/benchmarks/<name>/`; the registry's
champion becomes `data/champion/`.
"""

import glob
import hashlib
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml
from pydantic import field_validator

from tasks import registry, sources
from tasks.config import StageParams, load_params
from tasks.errors import DataError, StageError
from tasks.files import file_digest, jsonl, replaced, write_text
from tasks.stage import run_main

RAW = Path("data/raw")
BENCHMARKS = Path("data/benchmarks")
CHAMPION = Path("data/champion")

Reader = Callable[[], Iterable[sources.Row]]
PACKAGES: dict[str, Reader] = {
    "mendeleev": sources.elements,
    "chatterbot-corpus": sources.dialogs,
}
BENCHMARK_PACKAGES: dict[str, Reader] = {
    "mendeleev": sources.element_items,
}
log = logging.getLogger(__name__)


class SnapshotParams(StageParams):
    """What to bring in.

    Attributes:
        sources: Name of each source -> `package:<name>`, or a path or glob of JSONL files.
        benchmarks: Name of each benchmark -> `package:<name>`, or a folder with task.yaml and
            items.jsonl.
    """

    sources: dict[str, str]
    benchmarks: dict[str, str]

    @field_validator("sources", "benchmarks")
    @classmethod
    def _names_are_folders(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"name {name!r} becomes a folder; use a-z, 0-9 and _ only")
        return values

    @field_validator("sources")
    @classmethod
    def _sources_are_known(cls, values: dict[str, str]) -> dict[str, str]:
        return _require_known(values, PACKAGES)

    @field_validator("benchmarks")
    @classmethod
    def _benchmarks_are_known(cls, values: dict[str, str]) -> dict[str, str]:
        return _require_known(values, BENCHMARK_PACKAGES)


def main() -> None:
    """Bring in sources, benchmarks and the champion; version what changed with DVC."""
    params = load_params(SnapshotParams, "snapshot")
    for source, location in params.sources.items():
        write_shards(source, contents(location), RAW)
    for name, location in params.benchmarks.items():
        write_benchmark(name, location, BENCHMARKS)
    registry.write_champion(CHAMPION)
    for folder in (RAW, BENCHMARKS):
        version(folder)


def contents(location: str) -> Iterator[bytes]:
    """Yield the bytes of each shard that a source offers now.

    Raises:
        DataError: A path or glob matches no file.
    """
    if location.startswith("package:"):
        yield jsonl(PACKAGES[location.removeprefix("package:")]()).encode()
        return
    paths = sorted(Path(p) for p in glob.glob(location, recursive=True))  # noqa: PTH207 - absolute globs
    if not paths:
        raise DataError(f"snapshot.sources: {location} matches no file; correct the path or glob")
    yield from (path.read_bytes() for path in paths)


def write_shards(source: str, shards: Iterable[bytes], raw: Path) -> list[Path]:
    """Write the shards whose bytes are new, numbered by arrival.

    The arrival number is common to all sources and only grows, so that data which came first stays
    first: deduplication keeps the first of two equal rows.

    Returns:
        The new shards, `raw/<source>/<arrival>.jsonl`.
    """
    known = {file_digest(path) for path in (raw / source).glob("*.jsonl")}
    arrival = max((int(path.stem) for path in raw.glob("*/*.jsonl")), default=0)
    new = []
    for content in shards:
        digest = hashlib.sha256(content).hexdigest()
        if digest in known:
            continue
        known.add(digest)
        arrival += 1
        new.append(raw / source / f"{arrival:06d}.jsonl")
        with replaced(new[-1]) as temporary:
            temporary.write_bytes(content)
    log.info("%s: %d new shard(s)", source, len(new))
    return new


def write_benchmark(name: str, location: str, benchmarks: Path) -> None:
    """Write `<name>/items.jsonl` and `<name>/task.yaml` (an lm-eval task) below `benchmarks`."""
    target = benchmarks / name
    if not location.startswith("package:"):
        shutil.copytree(location, target, dirs_exist_ok=True)
        return
    items = BENCHMARK_PACKAGES[location.removeprefix("package:")]()
    write_text(target / "items.jsonl", jsonl(items))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(target / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    write_text(target / "task.yaml", yaml.safe_dump(task, sort_keys=False))


def version(folder: Path) -> None:
    """Put a folder under DVC's control (`<folder>.dvc`); nothing happens if it did not change.

    Raises:
        StageError: DVC refuses; its message is passed on.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StageError(f"dvc add {folder} failed: {done.stderr.strip()}; see `dvc doctor`")


def _require_known(values: dict[str, str], packages: dict[str, Reader]) -> dict[str, str]:
    """Reject `package:` locations that nobody reads."""
    for location in values.values():
        name = location.removeprefix("package:")
        if location.startswith("package:") and name not in packages:
            raise ValueError(f"{location!r} is unknown; known packages: {', '.join(packages)}")
    return values


if __name__ == "__main__":
    run_main(main)
