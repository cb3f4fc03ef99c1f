"""Where training data comes from: files, object stores, the Hub, databases, installed packages.

Each kind of location offers its files as streams of bytes; `tasks.snapshot` keeps those that are new.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """One file that a source offers.

    Attributes:
        suffix: Format and compression, such as `.jsonl.gz`; see `nightshift.raw.formats`.
        chunks: The bytes, piece by piece; read once.
    """

    suffix: str
    chunks: Iterable[bytes]
