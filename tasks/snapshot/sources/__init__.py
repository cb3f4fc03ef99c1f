"""Sources of training data: files, object stores, URLs, the Hub, databases, installed packages.

Each kind of location offers its files as byte streams; `tasks.snapshot` keeps the new ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """One file that a source offers.

    Attributes:
        suffix: Format and compression, such as `.jsonl.gz`; see `nightshift.raw.formats`.
        chunks: Content in chunks of bytes; can be read once.
        name: Name of the file at its source, without the fixed part of the location; the next version of the
            file has the same name.
        changed: When the file last changed, in seconds since 1970; None if the source does not say.
        version: What identifies the content without reading it, such as an ETag; None if nothing does.
    """

    suffix: str
    chunks: Iterable[bytes]
    name: str = ""
    version: str | None = None
    changed: float | None = None
