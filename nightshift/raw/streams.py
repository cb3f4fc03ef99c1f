"""Decompressed bytes and lines of a shard, within limits: a small file cannot fill memory or disk."""

import bz2
import io
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nightshift.core.errors import DataError

BOM = b"\xef\xbb\xbf"
# The first bytes of text in other encodings: byte order marks, and the zero bytes of ASCII without one.
ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# Small files may have any ratio: 64 MiB do no harm.
RATIO_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Size limits of a shard.

    Attributes:
        row_bytes: Maximum size of a row, bytes.
        shard_bytes: Maximum size of a shard after decompression, bytes.
        ratio: Maximum decompressed bytes per compressed byte, beyond the first 64 MiB.
    """

    row_bytes: int
    shard_bytes: int
    ratio: int


class LimitedStream(io.RawIOBase):
    """Decompressed bytes of a shard, checked against the limits."""

    def __init__(self, path: Path, codec: str | None, limits: Limits) -> None:
        """Open a shard.

        Args:
            path: Path of the shard.
            codec: gzip, zstd, bz2, xz, or None if it is not compressed.
            limits: Size limits.
        """
        self._path = path
        self._source: Any = open_codec(path, codec)
        self._limits = limits
        self._count = 0

    def readable(self) -> bool:
        """Return True: the stream is readable."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and return the number of bytes read.

        Raises:
            DataError: The compressed data is damaged or truncated, or exceeds the limits.
        """
        try:
            count = int(self._source.readinto(buffer))
        except (OSError, EOFError, lzma.LZMAError) as err:
            raise damaged(self._path, err) from err
        self._count += count
        require_size(self._path, self._count, self._limits)
        return count

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._source.close()
        super().close()


def open_codec(path: Path, codec: str | None, *, write: bool = False) -> Any:
    """Open a file of compressed bytes to read them decompressed, or to write them."""
    if codec == "xz":
        return lzma.open(path, "wb" if write else "rb")
    if codec == "bz2":
        return bz2.open(path, "wb" if write else "rb")
    opened = pa.output_stream if write else pa.input_stream
    return opened(str(path), compression=codec)


def require_size(path: Path, size: int, limits: Limits) -> None:
    """Check the decompressed size of a shard in bytes, in total or read so far.

    Raises:
        DataError: The size exceeds a limit.
    """
    on_disk = path.stat().st_size
    if size > limits.shard_bytes or size > max(RATIO_FREE_BYTES, limits.ratio * on_disk):
        raise DataError(
            f"{path}: {on_disk} bytes expand to {size} or more; if the file is trusted, raise "
            f"ingest.max_shard_bytes={limits.shard_bytes} or ingest.max_compression_ratio={limits.ratio}, "
            "otherwise remove the shard"
        )


def damaged(path: Path, err: object) -> DataError:
    """Build the error for a shard that cannot be read any further."""
    return DataError(
        f"{path}: damaged or truncated: {err}; complete the file at its source and run `nightshift "
        "snapshot`, or remove this shard"
    )


def open_bytes(path: Path, codec: str | None, limits: Limits) -> io.BufferedReader:
    """Open a shard for reading, decompressed and limited in size."""
    return io.BufferedReader(LimitedStream(path, codec, limits), 1 << 18)


def read_line(file: io.BufferedReader, limit: int) -> bytes | None:
    """Read one line with its line break: b"" at the end of the file, None for a line above the limit."""
    line = file.readline(limit + 1)
    if len(line) <= limit or line.endswith(b"\n"):
        return line
    while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
        pass
    return None


def skip_bom(path: Path, file: io.BufferedReader) -> None:
    """Skip the UTF-8 byte order mark that some editors write.

    Raises:
        DataError: The file has another encoding.
    """
    start = file.peek(4)[:4]
    if start.startswith(BOM):
        file.read(len(BOM))
        return
    other = next((name for mark, name in ENCODINGS if start.startswith(mark)), None)
    # ASCII without a mark: every second byte is zero, or three of four.
    if other is None and len(start) == 4 and start.count(0) in (2, 3):
        other = "UTF-16" if start.count(0) == 2 else "UTF-32"
    if other:
        raise not_utf8(path, other)


def not_utf8(path: Path, found: str) -> DataError:
    """Build the error for a file in another encoding."""
    return DataError(
        f"{path}: the text is {found}; save the source file as UTF-8 and run `nightshift snapshot`"
    )
