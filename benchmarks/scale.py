"""Prepare a million conversations from ingest to pack: memory, and cost by number of rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.corpus import chats
from benchmarks.record import Record, record
from benchmarks.stages import STAGES, Cost, make_folder, run_stages
from nightshift.core.files import jsonl, read_json

SIZES = (10_000, 100_000, 1_000_000)
# Cost per row in the largest corpus relative to the next smaller; the rest is startup of six processes.
LINEAR = 1.25


def measure(folder: Path) -> list[Record]:
    """Run all data stages at each size, and record memory and cost per row."""
    costs: dict[int, dict[str, Cost]] = {}
    packed: dict[int, int] = {}
    for size in SIZES:
        target = folder / str(size)
        # Paraphrasing is measured with a model elsewhere; here the stage passes every row through.
        make_folder(target, {"augment": {"sources": []}, "split": {"by_phrasing": []}})
        shard = target / "data" / "raw" / "chats" / "000001.jsonl"
        shard.parent.mkdir(parents=True)
        with shard.open("w", encoding="utf-8") as file:
            file.writelines(jsonl([row]) for row in chats(size, seed=0))
        costs[size] = run_stages(STAGES, target)
        packed[size] = read_json(target / "data" / "pack" / "summary.json")["tokens_out"]
    per_row = {
        size: sum(cost.seconds for cost in stages.values()) / size * 1e6 for size, stages in costs.items()
    }
    peak = max(cost.peak_mib for cost in costs[SIZES[-1]].values())
    shown: dict[str, Any] = {
        "stages": {str(size): {s: asdict(c) for s, c in stages.items()} for size, stages in costs.items()}
    }
    return [
        record(
            "prepare 1,000,000 rows: peak memory of any stage",
            peak / 1024,
            "GiB",
            at_most=12.0,
            tokens_packed=packed,
            **shown,
        ),
        record(
            "prepare 1,000,000 rows: cost of a row against 100,000 rows",
            per_row[SIZES[-1]] / per_row[SIZES[-2]],
            "ratio",
            at_most=LINEAR,
            microseconds_per_row={str(size): round(value, 1) for size, value in per_row.items()},
        ),
    ]
