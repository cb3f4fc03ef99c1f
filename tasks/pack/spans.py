"""Cut encoded examples into spans, and keep the spans in a file."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nightshift.data.encode import IGNORED, Encoded
from nightshift.data.tokenizer import Ids
from tasks.pack import OverLength

Numbers = NDArray[np.int64]


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of an example, contiguous in one row."""

    start: int
    stop: int


def fit(encoded: Encoded, max_length: int, over_length: OverLength) -> tuple[list[Span], Counter[str]]:
    """Cut an example into spans of at most `max_length` tokens, each with a supervised token.

    The first token of a span has no context to be predicted from, so its label does not count.

    Returns:
        Spans in order; number of lost tokens by reason.
    """
    spans: list[Span] = []
    lost: Counter[str] = Counter()
    length = len(encoded.input_ids)
    if length <= max_length and np.any(encoded.labels[1:] != IGNORED):
        return [Span(0, length)], lost
    for span in cut(length, encoded.rounds.tolist(), max_length, over_length):
        if np.any(encoded.labels[span.start + 1 : span.stop] != IGNORED):
            spans.append(span)
        else:
            lost["no_supervised_token"] += span.stop - span.start
    lost["over_length"] = length - sum(span.stop - span.start for span in spans) - lost.total()
    return spans, +lost


def cut(length: int, rounds: Sequence[int], max_length: int, over_length: OverLength) -> list[Span]:
    """Return the spans of an example to keep.

    Args:
        length: Tokens of the example.
        rounds: First token of each round of a chat; empty for a plain text.
        max_length: Tokens of a span, at most.
        over_length: Handling of a longer example.

    Example:
        >>> cut(5, [], 4, "drop"), cut(5, [], 4, "truncate"), cut(5, [], 4, "split")
        ([], [Span(start=0, stop=4)], [Span(start=0, stop=4), Span(start=4, stop=5)])
    """
    if length <= max_length:
        return [Span(0, length)]
    match over_length:
        case "truncate":
            return [Span(0, max_length)]
        case "split" if len(rounds):
            return join_rounds([*rounds, length], max_length)
        case "split":
            return [Span(start, min(start + max_length, length)) for start in range(0, length, max_length)]
        case _:
            return []


def join_rounds(edges: Sequence[int], max_length: int) -> list[Span]:
    """Join consecutive rounds to spans of at most `max_length` tokens; a longer round is left out.

    Args:
        edges: First token of each round, then the number of tokens.
        max_length: Tokens of a span, at most.

    Example:
        >>> join_rounds([0, 3, 5, 11, 13], max_length=5)
        [Span(start=0, stop=5), Span(start=11, stop=13)]
    """
    spans: list[Span] = []
    for start, stop in pairwise(edges):
        if spans and spans[-1].stop == start and stop - spans[-1].start <= max_length:
            spans[-1] = Span(spans[-1].start, stop)
        elif stop - start <= max_length:
            spans.append(Span(start, stop))
    return spans


@dataclass(slots=True)
class SpanFile:
    """Spans, with their tokens in a temporary file that is gone when the process ends.

    Attributes:
        examples: Number of each span's example.
        starts: First token of each span in its example.
        lengths: Tokens of each span.
    """

    file: Any
    examples: "array[int]" = field(default_factory=lambda: array("q"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))

    @classmethod
    @contextmanager
    def create(cls, folder: Path) -> "Iterator[SpanFile]":
        """Create an empty file in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            yield cls(file)

    def append(self, example: int, span: Span, encoded: Encoded) -> int:
        """Append a span of an example, and return the number of its supervised tokens."""
        ids = encoded.input_ids[span.start : span.stop]
        is_supervised = encoded.labels[span.start : span.stop] != IGNORED
        is_supervised[0] = False
        # The complement, which is negative, means no label.
        self.file.write(np.where(is_supervised, ids, ~ids).tobytes())
        self.examples.append(example)
        self.starts.append(span.start)
        self.lengths.append(span.stop - span.start)
        return int(np.count_nonzero(is_supervised))

    def offsets(self) -> Numbers:
        """Return the position of each span in the file, in bytes."""
        lengths = np.asarray(self.lengths)
        offsets: Numbers = 4 * (np.cumsum(lengths) - lengths)
        return offsets

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> tuple[Ids, Ids]:
        """Return ids and labels of spans, one after the other."""
        self.file.flush()
        number = self.file.fileno()
        parts = [os.pread(number, 4 * n, at) for at, n in zip(offsets, lengths, strict=True)]
        values = np.frombuffer(b"".join(parts), dtype=np.int32)
        ids: Ids = np.where(values < 0, ~values, values)
        return ids, np.where(values < 0, np.int32(IGNORED), values)
