"""Run the stage: write new shards, benchmarks, the champion, and the start of the training."""

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

import yaml

from nightshift.core.config import load_params
from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, jsonl, read_json, text_digest, write_json, write_text
from nightshift.core.memo import Memo
from nightshift.core.paths import BENCHMARKS, CHAMPION, CHAMPION_RECORD, RAW
from nightshift.core.stage import run_main, write_summary
from nightshift.data.benchmarks import CHOICE_TASK, read_benchmarks
from nightshift.data.used import write_used
from nightshift.pipeline.dvc_cache import restore
from nightshift.raw.erase import erase_known
from nightshift.raw.forgotten import Forgotten, read_forgotten
from nightshift.raw.options import write_options
from nightshift.raw.shards import DIGESTS, find_shards, read_digests, used_shards
from nightshift.raw.unused import unused_by_snapshot
from nightshift.raw.versions import Versions, read_versions, write_versions
from nightshift.registry import versions
from tasks.snapshot import SnapshotParams
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.folders import resolve
from tasks.snapshot.sources.harness import harness_items
from tasks.snapshot.sources.packages import BENCHMARK_PACKAGES
from tasks.snapshot.start import update_start

log = logging.getLogger(__name__)


def main() -> None:
    """Fetch sources, benchmarks and the champion.

    Raises:
        DataError: A benchmark has an invalid format.
        StageError: Data referenced by dvc.lock cannot be found.
    """
    params = load_params(SnapshotParams, "snapshot")
    for folder in (RAW, BENCHMARKS):
        restore(folder)
    for name, origin in params.benchmarks.items():
        write_benchmark(name, origin, BENCHMARKS)
    write_used(BENCHMARKS, params.benchmarks)
    benchmarks = read_benchmarks(BENCHMARKS)
    with Memo("sources", {"digest": "sha256"}) as memo:
        for name, source in params.sources.items():
            offers = arrived(source.offers(), params.until)
            for shard in write_shards(name, offers, RAW, source.mode, memo):
                erase_known(shard, RAW)
    write_used(RAW, params.sources)
    write_options(RAW, params.sources)
    update_champion()
    update_start()
    used = Counter(shard.parent.name for _, shard in used_shards(RAW))
    written = Counter(shard.parent.name for _, shard in find_shards(RAW))
    for line in unused_by_snapshot():
        log.warning("not listed in params.yaml, unused: %s", line)
    write_summary(
        "snapshot",
        rows_in=0,
        rows_out=0,
        shards=dict(used),
        shards_withdrawn={
            name: written[name] - used[name] for name in params.sources if used[name] < written[name]
        },
        questions={benchmark.name: len(benchmark.items) for benchmark in benchmarks},
    )


def arrived(offers: Iterable[Offer], until: datetime | None) -> Iterator[Offer]:
    """Yield the offers that have not changed after a moment, if any; sources that do not say offer all."""
    for offer in offers:
        if until is None or offer.changed is None or offer.changed <= until.timestamp():
            yield offer


def write_shards(
    source: str,
    offers: Iterable[Offer],
    raw: Path,
    mode: Literal["append", "replace"] = "append",
    memo: Memo | None = None,
) -> list[Path]:
    """Write the offered files whose bytes are new, numbered by arrival, and record which are in use.

    The arrival number is shared by all sources and only increases, so that earlier data stays first:
    deduplication keeps the first of two equal rows.

    Args:
        source: Name of the source.
        offers: Files that the source offers now.
        raw: Folder of the shards.
        mode: Whether earlier shards stay in use or the offered files are the whole source.
        memo: Cache of the digests of files that were read before.

    Returns:
        New shards, `raw/<source>/<arrival>.<suffix>`.
    """
    digests = digest_shards(raw)
    known = known_shards(source, digests, read_forgotten(raw))
    arrival = max((arrival for arrival, _ in find_shards(raw)), default=0)
    new: list[Path] = []
    offered: dict[str, str] = {}
    temporary = raw / source / ".incoming"
    for offer in offers:
        digest = recall(offer, memo)
        try:
            if digest not in known:
                digest = receive(offer, temporary)
            if digest not in known:
                arrival += 1
                new.append(raw / source / f"{arrival:06d}{offer.suffix}")
                temporary.replace(new[-1])
                known[digest] = f"{source}/{new[-1].name}"
                digests[known[digest]] = digest
        finally:
            temporary.unlink(missing_ok=True)
        remember(offer, digest, memo)
        offered[offer.name] = known[digest]
    record_versions(source, offered, raw, mode)
    write_json(raw / DIGESTS, digests)
    log.info("%s: %d new shard(s)", source, len(new))
    return new


def known_shards(source: str, digests: Mapping[str, str], forgotten: Forgotten) -> dict[str, str]:
    """Return digest -> name of the shards of a source, also of the bytes before rows were erased."""
    known = {digest: name for name, digest in reversed(list(digests.items()))}
    known |= {digest: name for name, before in forgotten.shards.items() for digest in before}
    return {digest: name for digest, name in known.items() if name.startswith(f"{source}/")}


def record_versions(
    source: str, offered: Mapping[str, str], raw: Path, mode: Literal["append", "replace"]
) -> None:
    """Record which shard each offered file is now, and in mode `replace` that the others are withdrawn."""
    versions = read_versions(raw)
    one = versions.setdefault(source, Versions())
    one.update(offered)
    before, one.export = one.export, sorted(set(offered.values())) if mode == "replace" else None
    if before and one.export and (gone := set(before) - set(one.export)):
        log.info("%s: the export changed; %d earlier shard(s) are withdrawn from training", source, len(gone))
    write_versions(raw, versions)


def recall(offer: Offer, memo: Memo | None) -> str | None:
    """Return the digest of a file that was read before and has not changed since, if it is known."""
    if not (memo and offer.version):
        return None
    key = text_digest(offer.version, size=16)
    found = memo.read([key]).get(key)
    return found.decode() if found else None


def remember(offer: Offer, digest: str, memo: Memo | None) -> None:
    """Cache the digest of a file."""
    if memo and offer.version:
        memo.write([(text_digest(offer.version, size=16), digest.encode())])


def receive(offer: Offer, target: Path) -> str:
    """Write the bytes of an offer to a file and return their SHA-256 hex digest."""
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
    """Return name -> SHA-256 of all existing shards; a shard that is not listed yet is hashed.

    Raises:
        DataError: A file is not a shard.
    """
    listed = read_digests(raw)
    names = [shard.relative_to(raw).as_posix() for _, shard in find_shards(raw)]
    return {name: listed.get(name) or file_digest(raw / name) for name in names}


def write_benchmark(name: str, location: str, benchmarks: Path) -> None:
    """Write `<name>/task.yaml` and `<name>/items.jsonl` in `benchmarks`, for `read_benchmarks`.

    Raises:
        DataError: The location is not a folder, or its files cannot be copied.
    """
    target = benchmarks / name
    kind, _, rest = location.partition(":")
    if kind == "package":
        task, read_items = BENCHMARK_PACKAGES[rest]
        items = read_items()
    elif kind == "lm-eval":
        task, items = CHOICE_TASK, harness_items(rest)
    else:
        copy_benchmark(resolve(location)[0], target, f"snapshot.benchmarks.{name}: {location}")
        return
    write_text(target / "items.jsonl", jsonl(items))
    write_text(target / "task.yaml", yaml.safe_dump(task, sort_keys=False))


def copy_benchmark(source: Path, target: Path, where: str) -> None:
    """Copy a benchmark folder.

    Raises:
        DataError: It is not a folder, or one of its files cannot be copied.
    """
    if not source.is_dir():
        problem = "is a file, not a folder" if source.exists() else "not found"
        raise DataError(
            f"{where}: {problem}; set it to a folder with task.yaml and items.jsonl, or remove it from "
            "params.yaml"
        )
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except shutil.Error as err:
        file, _, reason = err.args[0][0]
        raise DataError(
            f"{where}: {file} cannot be copied: {reason}; check permissions and disk space"
        ) from err


def update_champion() -> None:
    """Write the registry's champion; warn if it has none where the last snapshot found one.

    In a clone with its own registry, the gate would no longer compare with the champion that DVC restored.
    """
    before = read_json(CHAMPION_RECORD)["version"] if CHAMPION_RECORD.is_file() else None
    versions.write_champion(CHAMPION)
    if before is not None and read_json(CHAMPION_RECORD)["version"] is None:
        log.warning(
            "%s: version %d was the champion, but this registry has none, so the gate compares with the base "
            "only; to go back, run `git checkout dvc.lock` and `dvc checkout --force %s`, and set "
            "MLFLOW_TRACKING_URI to the registry that has it",
            CHAMPION_RECORD,
            before,
            CHAMPION,
        )


if __name__ == "__main__":
    run_main(main, is_online=True)
