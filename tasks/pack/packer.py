"""Assign spans to rows with TRL's packer, in a process of its own.

Importing the packer also imports torch, which takes seconds and hundreds of MB. The process does so while
the stage reads its examples.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa

from nightshift.core.errors import StageError
from tasks.pack.spans import Numbers

# The packer needs about 8 bytes per token.
TOKENS_PER_BATCH = 2**24
Pack = Callable[[Sequence[int], int], list[list[int]]]


@contextlib.contextmanager
def start_packer() -> Iterator[Pack]:
    """Start the process, and yield a function that calls `pack` there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    # The process ends when this end of the pipe closes, also if this process is killed.
    theirs.close()

    def call(lengths: Sequence[int], max_length: int) -> list[list[int]]:
        try:
            ours.send((lengths, max_length))
            rows: list[list[int]] = ours.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise StageError(
                f"pack: the packer ended with exit code {process.exitcode}; see its output above (-9: out of "
                "memory)"
            ) from None
        return rows

    try:
        yield call
    finally:
        ours.close()
        process.terminate()
        process.join()


def serve(pipe: Connection) -> None:
    """Import the packer, then answer one call."""
    import trl.data_utils  # noqa: F401

    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send(pack(*pipe.recv()))


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Assign spans to rows with TRL's best-fit-decreasing packer.

    The packer sees `TOKENS_PER_BATCH` tokens at once, and lengths only: equal ones get spans in order.

    Args:
        lengths: Tokens per span, shape (n_spans,), each 1 to `max_length`.
        max_length: Row capacity, in tokens.

    Returns:
        Span numbers of each row, in row order; every span is in exactly one row, unsplit.

    Example:
        >>> pack([5, 2, 3, 1], max_length=6)
        [[0, 3], [2, 1]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    batches = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // TOKENS_PER_BATCH)) + 1
    rows = [row for batch in np.split(sizes, batches) for row in _pack_batch(batch, max_length)]
    placed = np.concatenate(rows)
    spans = np.empty_like(placed)
    spans[np.argsort(-placed, kind="stable")] = np.argsort(-sizes, kind="stable")
    return [row.tolist() for row in np.split(spans, np.cumsum([len(row) for row in rows])[:-1])]


def _pack_batch(lengths: Numbers, max_length: int) -> list[Numbers]:
    """Return the lengths of the spans in each row. The packer moves a column of nulls, not of tokens."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # noqa: PTH123 - a device
        from datasets import Dataset
        from trl.data_utils import pack_dataset

        offsets = np.concatenate([[0], np.cumsum(lengths)], dtype=np.int32)
        column: Any = pa.ListArray.from_arrays(offsets, pa.nulls(int(lengths.sum())))
        packed = pack_dataset(
            Dataset(pa.table({"span": column})),
            seq_length=max_length,
            strategy="bfd",
            map_kwargs={"batch_size": len(lengths), "load_from_cache_file": False},
        )
    rows = packed.data.table["seq_lengths"].combine_chunks()
    return np.split(rows.values.to_numpy().astype(np.int64), rows.offsets.to_numpy()[1:-1])
