"""Packed rows for the ranks: what is known of each row, and an Arrow file that all ranks map into memory.

As Python lists, tokens and labels take 200 bytes a token in every process. Mapped, they take 8 bytes a token
on disk, and the ranks of a machine share the pages that the kernel has read: none of them holds a row that
it does not train on. Parquet is compressed, so it cannot be mapped; it is read one row group at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.core.files import atomic_write
from nightshift.data.encode import IGNORED
from tasks.sft.plan import FILLER

TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema([("input_ids", TOKENS), ("labels", TOKENS), ("seq_lengths", TOKENS)])
# Rows of a batch that are converted from Python lists at once.
ROWS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the plan and the checks of the stage need to know of the packed rows.

    Attributes:
        lengths: Tokens of the examples in each row, shape (n_rows, any).
        labelled: Labelled tokens of each row, shape (n_rows,).
        largest_token: Highest token id of all rows.
    """

    lengths: list[list[int]]
    labelled: list[int]
    largest_token: int

    @property
    def tokens(self) -> list[int]:
        """Return the tokens of each row, shape (n_rows,)."""
        return [sum(lengths) for lengths in self.lengths]


def read_sizes(path: Path) -> Sizes:
    """Read the sizes of the rows of a Parquet file, with one row group in memory at a time."""
    lengths: list[list[int]] = []
    labelled: list[int] = []
    largest = 0
    for batch in iterate_row_groups(path):
        lengths += batch["seq_lengths"].to_pylist()
        labels = batch["labels"]
        counts = np.concatenate([[0], np.cumsum(labels.values.to_numpy() != IGNORED)])
        labelled += np.diff(counts[labels.offsets.to_numpy()]).tolist()
        largest = max(largest, int(batch["input_ids"].values.to_numpy().max(initial=0)))
    return Sizes(lengths, labelled, largest)


def iterate_row_groups(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield each row group of a Parquet file as one batch with the columns of `SCHEMA`."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=SCHEMA.names).select(SCHEMA.names)
            yield from table.cast(SCHEMA).combine_chunks().to_batches()


def write_mapped(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write rows as an Arrow stream, which `datasets` maps into memory."""
    with atomic_write(path) as temporary, pa.ipc.new_stream(str(temporary), SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


def as_batches(rows: Iterable[Mapping[str, Sequence[int]]]) -> Iterator[pa.RecordBatch]:
    """Convert rows to batches with the columns of `SCHEMA`."""
    remaining = iter(rows)
    while batch := list(islice(remaining, ROWS_PER_BATCH)):
        yield pa.RecordBatch.from_pylist(batch, schema=SCHEMA)


def map_rows(path: Path) -> Any:
    """Map a file of `write_mapped` into memory, as the data set of TRL's trainer."""
    # The stage and the plan read sizes only, and need no library for data sets.
    from datasets import Dataset

    return Dataset.from_file(str(path))


def planned_rows(path: Path, order: Sequence[int], filler: Mapping[str, Sequence[int]]) -> Any:
    """Map a file of `write_mapped` into memory, in the order of the plan.

    Args:
        path: File of rows.
        order: Row numbers, or `FILLER`.
        filler: Row that completes the last step.
    """
    from datasets import Dataset, concatenate_datasets

    rows = map_rows(path)
    with_filler = concatenate_datasets([rows, Dataset.from_list([dict(filler)], features=rows.features)])
    return with_filler.select([len(rows) if number == FILLER else number for number in order])
