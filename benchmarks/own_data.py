"""Prepare chats of 340 tokens from ingest to pack, with an empty cache: seconds and peak memory per stage."""

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.corpus import real_documents
from benchmarks.record import record, require_bounds, write_records
from benchmarks.stages import STAGES, make_folder, run_stages
from nightshift.core.files import jsonl, read_json
from nightshift.core.stage import run_main

PACKAGES = ("datasets", "pyarrow", "tokenizers", "transformers", "trl")
PARAMS: dict[str, dict[str, Any]] = {
    "augment": {"sources": []},
    "split": {"by_phrasing": []},
    "pack": {"max_length": 1024},
}
# Largest row of the generated chats in a packed row of 1024 tokens.
WORDS = (60, 300)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("--rows", type=int, default=200_000, help="number of chats")


def main(rows: int) -> None:
    """Measure all data stages and write results/own_data.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        make_folder(folder, PARAMS)
        shard = folder / "data" / "raw" / "chats" / "000001.jsonl"
        shard.parent.mkdir(parents=True)
        with shard.open("w", encoding="utf-8") as file:
            file.writelines(jsonl([row]) for row in passages(rows, seed=0))
        costs = {stage: asdict(cost) for stage, cost in run_stages(STAGES, folder).items()}
        tokens = read_json(folder / "data" / "pack" / "summary.json")["tokens_out"]
    seconds = sum(cost["seconds"] for cost in costs.values())
    peak = max(cost["peak_mib"] for cost in costs.values())
    about = {"rows": rows, "tokens_packed": tokens, "stages": costs}
    records = [
        record("prepare chats of 340 tokens: time from ingest to pack", seconds, "s", **about),
        record(
            "prepare chats of 340 tokens: peak memory of pack", costs["pack"]["peak_mib"], "MiB", at_most=1000
        ),
        record("prepare chats of 340 tokens: peak memory of any stage", peak, "MiB"),
    ]
    write_records("own_data", records, PACKAGES)
    require_bounds(records)


def passages(count: int, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield chats of words drawn from real text, so that no two are near: a third is the question."""
    rng = random.Random(seed)
    words = [word for text in real_documents(4000) for word in text.split()]
    for _ in range(count):
        drawn = rng.choices(words, k=rng.randint(*WORDS))
        question, answer = " ".join(drawn[: len(drawn) // 3]), " ".join(drawn[len(drawn) // 3 :])
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    run_main(main, declare)
