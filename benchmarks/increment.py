"""Compare a night with 1 % new data with a preparation from scratch: cost, and equality of the bytes.

A local model paraphrases, as in production, since this determines the cost of the preparation. The new
shard is 1 % of the rows of each source; all stages from dedupe to pack run as separate processes.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import Record, record
from benchmarks.stages import STAGES, Cost, environment, make_folder, run_stage, run_stages
from nightshift.core.files import jsonl, read_json, tree_digest
from tasks.snapshot.sources import packages

PARAPHRASED = 60
PARAMS: dict[str, dict[str, Any]] = {
    "augment": {
        "backend": "transformers",
        "sources": ["facts"],
        "over_generation": 1,
        "max_new_tokens": 40,
        # A model with 135 million parameters rarely keeps every fact; only its cost is measured.
        "min_acceptance_rate": 0.0,
    },
    "split": {"by_phrasing": ["facts"]},
}
PREPARATION = STAGES[1:]


def measure(folder: Path) -> list[Record]:
    """Prepare 100 % of the rows, then 101 % incrementally, then 101 % from scratch."""
    cold = folder / "cold"
    make_folder(cold, PARAMS)
    sources = {"dialogs": list(packages.dialogs()), "facts": facts()}
    for source, rows in sources.items():
        write_shard(cold, source, 1, rows[: -share(rows)])
    run_stage("ingest", cold)
    first = run_stages(PREPARATION, cold)
    for source, rows in sources.items():
        write_shard(cold, source, 2, rows[-share(rows) :])
    scratch = folder / "scratch"
    shutil.copytree(cold, scratch, ignore=shutil.ignore_patterns(".nightshift", *STAGES))
    run_stage("ingest", cold)
    night = run_stages(PREPARATION, cold)
    run_stages(STAGES, scratch)
    same = [outputs(cold, stage) == outputs(scratch, stage) for stage in STAGES]
    seconds = {"cold": total(first), "night": total(night)}
    return [
        record(
            "1 % new data: cost of dedupe to pack against a preparation from scratch",
            seconds["night"] / seconds["cold"],
            "ratio",
            at_most=0.05,
            seconds=seconds,
            stages={
                "cold": {stage: asdict(cost) for stage, cost in first.items()},
                "night": {stage: asdict(cost) for stage, cost in night.items()},
            },
            augment=read_json(cold / "data" / "augment" / "summary.json"),
        ),
        record(
            "1 % new data: stages whose bytes equal those of a rebuild from scratch",
            sum(same) / len(same),
            "share",
            at_least=1.0,
        ),
    ]


def facts() -> list[dict[str, Any]]:
    """Return plain texts about the first elements, from the answers of their conversations."""
    rows = list(packages.elements())[:PARAPHRASED]
    return [{"text": " ".join(turn["content"] for turn in row["messages"][1:4:2])} for row in rows]


def share(rows: Sequence[object]) -> int:
    """Return the number of rows that equals 1 % of the remaining rows."""
    return max(1, len(rows) // 101)


def write_shard(folder: Path, source: str, arrival: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a shard, with the code of the nightly snapshot stage."""
    incoming = folder / "incoming" / f"{source}-{arrival}.jsonl"
    incoming.parent.mkdir(exist_ok=True)
    incoming.write_text(jsonl(rows), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from tasks.snapshot.__main__ import write_shards; "
        "from tasks.snapshot.sources.locations import read_offers; "
        "write_shards(sys.argv[1], read_offers(sys.argv[2]), Path('data/raw'))"
    )
    command = [sys.executable, "-c", code, source, str(incoming)]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True)


def outputs(folder: Path, stage: str) -> str:
    """Return the digest of all outputs of a stage."""
    return tree_digest(folder / "data" / stage)


def total(costs: dict[str, Cost]) -> float:
    """Return the total seconds of all stages."""
    return sum(cost.seconds for cost in costs.values())
