"""Sources of training data: files, object stores, the Hub, databases, installed packages.

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
    """

    suffix: str
    chunks: Iterable[bytes]
