"""Bring the outside in, as files: new data, benchmarks, and the champion's identity.

The first stage of the graph. DVC runs it when its parameters change or an output is missing, the flow
every night. Sources (params.yaml) become immutable shards `data/raw/<source>/<arrival>.<suffix>`; a shard
is written only when its bytes are new, so a night without new data changes nothing. Benchmarks become
`data/benchmarks/<name>/`; the registry's champion becomes `data/champion/`. What params.yaml no longer names
stays, and is not used.

The outputs persist in dvc.yaml: DVC neither removes them before a run nor puts those of an earlier run in
their place.
"""

import hashlib
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import field_validator

from tasks import registry
from tasks.benchmarks import CHOICE_TASK, HELDOUT, read_benchmarks
from tasks.config import StageParams, load_params
from tasks.dvc_cache import restore
from tasks.erase import erase_known
from tasks.files import file_digest, jsonl, write_json, write_text
from tasks.ingest.forgotten import read_forgotten
from tasks.ingest.shards import DIGESTS, find_shards, read_digests, used_shards
from tasks.sources import Offer
from tasks.sources.harness import harness_items
from tasks.sources.locations import Location, read_offers, require_location, require_query
from tasks.sources.packages import BENCHMARK_PACKAGES
from tasks.stage import DATA, run_main, write_summary
from tasks.used import write_used

RAW = DATA / "raw"
BENCHMARKS = DATA / "benchmarks"
CHAMPION = DATA / "champion"
log = logging.getLogger(__name__)


class SnapshotParams(StageParams):
    """What to bring in.

    Attributes:
        sources: Name of each source -> location; see `tasks.sources.locations`.
        benchmarks: Name of each benchmark -> `package:<name>`, `lm-eval:<task>`, or a folder with
            task.yaml and items.jsonl.
    """

    sources: dict[str, Location]
    benchmarks: dict[str, str]

    @field_validator("sources", mode="before")
    @classmethod
    def _queries_are_whole(cls, values: Any) -> Any:
        for location in values.values() if isinstance(values, dict) else ():
            if isinstance(location, dict):
                require_query(location)
        return values

    @field_validator("sources", "benchmarks")
    @classmethod
    def _names_are_folders(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"name {name!r} becomes a folder; use a-z, 0-9 and _ only")
        return values

    @field_validator("sources")
    @classmethod
    def _sources_are_known(cls, values: dict[str, Location]) -> dict[str, Location]:
        for location in values.values():
            if isinstance(location, str):
                require_location(location)
        return values

    @field_validator("benchmarks")
    @classmethod
    def _benchmarks_are_known(cls, values: dict[str, str]) -> dict[str, str]:
        if HELDOUT in values:
            raise ValueError(f"{HELDOUT!r} is the name of the held-out examples; use another one")
        for location in values.values():
            name = location.removeprefix("package:")
            if location.startswith("package:") and name not in BENCHMARK_PACKAGES:
                raise ValueError(f"{location!r} is unknown; known packages: {', '.join(BENCHMARK_PACKAGES)}")
        return values


def main() -> None:
    """Bring in sources, benchmarks and the champion.

    Raises:
        DataError: A benchmark breaks the format.
        StageError: dvc.lock names data that is nowhere.
    """
    params = load_params(SnapshotParams, "snapshot")
    for folder in (RAW, BENCHMARKS):
        restore(folder)
    for name, origin in params.benchmarks.items():
        write_benchmark(name, origin, BENCHMARKS)
    write_used(BENCHMARKS, params.benchmarks)
    benchmarks = read_benchmarks(BENCHMARKS)
    for source, location in params.sources.items():
        for shard in write_shards(source, read_offers(location), RAW):
            erase_known(shard, RAW)
    write_used(RAW, params.sources)
    registry.write_champion(CHAMPION)
    write_summary(
        "snapshot",
        rows_in=0,
        rows_out=0,
        shards=dict(Counter(shard.parent.name for _, shard in used_shards(RAW))),
        questions={benchmark.name: len(benchmark.items) for benchmark in benchmarks},
    )


def write_shards(source: str, offers: Iterable[Offer], raw: Path) -> list[Path]:
    """Write the offered files whose bytes are new, numbered by arrival.

    The arrival number is common to all sources and only grows, so that data which came first stays
    first: deduplication keeps the first of two equal rows.

    Returns:
        The new shards, `raw/<source>/<arrival>.<suffix>`.
    """
    digests = digest_shards(raw)
    known = {digest for name, digest in digests.items() if name.startswith(f"{source}/")}
    for name, before in read_forgotten(raw).shards.items():
        known.update(before if name.startswith(f"{source}/") else ())
    arrival = max((arrival for arrival, _ in find_shards(raw)), default=0)
    new = []
    temporary = raw / source / ".incoming"
    for offer in offers:
        try:
            digest = receive(offer, temporary)
            if digest in known:
                continue
            known.add(digest)
            arrival += 1
            new.append(raw / source / f"{arrival:06d}{offer.suffix}")
            temporary.replace(new[-1])
        finally:
            temporary.unlink(missing_ok=True)
        digests[new[-1].relative_to(raw).as_posix()] = digest
    write_json(raw / DIGESTS, digests)
    log.info("%s: %d new shard(s)", source, len(new))
    return new


def receive(offer: Offer, target: Path) -> str:
    """Write the bytes of an offer to a file and return their SHA-256, in hex."""
    state = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for chunk in offer.chunks:
            state.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return state.hexdigest()


def digest_shards(raw: Path) -> dict[str, str]:
    """Return name -> SHA-256 of all shards that are there; one that is not listed yet is read.

    Raises:
        DataError: A file is no shard.
    """
    listed = read_digests(raw)
    names = [shard.relative_to(raw).as_posix() for _, shard in find_shards(raw)]
    return {name: listed.get(name) or file_digest(raw / name) for name in names}


def write_benchmark(name: str, location: str, benchmarks: Path) -> None:
    """Write `<name>/task.yaml` and `<name>/items.jsonl` below `benchmarks`; see `tasks.benchmarks`."""
    target = benchmarks / name
    kind, _, rest = location.partition(":")
    if kind == "package":
        task, read_items = BENCHMARK_PACKAGES[rest]
        items = read_items()
    elif kind == "lm-eval":
        task, items = CHOICE_TASK, harness_items(rest)
    else:
        shutil.copytree(location, target, dirs_exist_ok=True)
        return
    write_text(target / "items.jsonl", jsonl(items))
    write_text(target / "task.yaml", yaml.safe_dump(task, sort_keys=False))


if __name__ == "__main__":
    run_main(main, is_online=True)
