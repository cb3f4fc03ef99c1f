"""Measure what the packed rows cost a rank: bytes of memory per token, as Python lists and mapped.

The figure is the peak of the private memory (RssAnon) of a process that opens the rows for two epochs and
reads every one, minus that before. Mapped pages of the file are no part of it: the ranks share them, and
the kernel drops them if memory is short. Their size is a figure of its own.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.record import record, require_bounds, write_records
from nightshift.core.files import write_batches
from nightshift.core.stage import run_main
from tasks.sft.rows import SCHEMA, as_batches, iterate_row_groups, planned_rows, read_sizes, write_mapped

PACKAGES = ("datasets", "pyarrow")
ROWS, LENGTH = 8000, 1024
FILLER_ROW = {"input_ids": [0, 0], "labels": [-100, -100], "seq_lengths": [2]}
# Seconds between two looks at the memory of this process.
PERIOD = 0.002


def main(way: str | None, folder: str | None) -> None:
    """Measure all ways, or with --way and --folder run only one, on the rows in the folder."""
    if way and folder:
        sys.stdout.write(f"{measure_growth(lambda: WAYS[way](Path(folder)))}\n")
        return
    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), ROWS, LENGTH)
        found = {name: bytes_per_token(name, Path(made), ROWS * LENGTH) for name in WAYS}
        size = (Path(made) / "rows.arrow").stat().st_size / (ROWS * LENGTH)
    records = [
        record("private memory of a rank, rows as Python lists (before)", found["lists"], "bytes a token"),
        record("private memory of a rank, rows mapped", found["mapped"], "bytes a token", at_most=1),
        record("private memory of the stage, sizes of the rows", found["sizes"], "bytes a token", at_most=8),
        record("mapped file, shared by all ranks of a machine", size, "bytes a token", at_most=8.1),
    ]
    write_records("rows", records, PACKAGES)
    require_bounds(records)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--way", choices=WAYS, help="read the rows in one way, and print the bytes it takes")
    parser.add_argument("--folder", help="folder with rows.parquet and rows.arrow, for --way")


def write_files(folder: Path, rows: int, length: int) -> None:
    """Write rows of three examples each, as pack and as the stage write them."""
    chance = random.Random(0)
    cuts = [length // 2, length // 4, length - length // 2 - length // 4]
    made = (
        {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :], "seq_lengths": cuts}
        for ids in (chance.choices(range(49_152), k=length) for _ in range(rows))
    )
    write_batches(folder / "rows.parquet", as_batches(made), SCHEMA)
    write_mapped(folder / "rows.arrow", iterate_row_groups(folder / "rows.parquet"))


def bytes_per_token(way: str, folder: Path, tokens: int) -> float:
    """Measure one way in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rows", "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return round(int(done.stdout) / tokens, 3)


def read_lists(folder: Path) -> None:
    """Read the rows as the ranks did before: as Python lists, and then as Arrow in memory."""
    from datasets import Dataset

    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    touch(Dataset.from_list([rows[i] for i in [*range(len(rows))] * 2]))


def read_mapped(folder: Path) -> None:
    """Read the rows as the ranks do."""
    count = pq.read_metadata(folder / "rows.parquet").num_rows
    touch(planned_rows(folder / "rows.arrow", [*range(count)] * 2, FILLER_ROW))


def touch(rows: Any) -> None:
    """Read every row once."""
    for i in range(len(rows)):
        rows[i]


WAYS: dict[str, Callable[[Path], object]] = {
    "lists": read_lists,
    "mapped": read_mapped,
    "sizes": lambda folder: read_sizes(folder / "rows.parquet"),
}


def measure_growth(run: Callable[[], object]) -> int:
    """Return by how many bytes the private memory of this process grew at most while a function ran."""
    import datasets  # noqa: F401 - the library is not part of the figure

    before, peak, is_done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(PERIOD):
            peak = max(peak, private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    is_done.set()
    thread.join()
    return max(peak, private_bytes()) - before


def private_bytes() -> int:
    """Return the resident memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    run_main(main, declare)
