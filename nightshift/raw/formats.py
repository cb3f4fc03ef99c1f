"""File formats that ingest reads, detected by the file name suffix."""

import re
from typing import Any

# A row as its author wrote it.
RawRow = dict[str, Any]
# The tables compress their own pages; another compression around them would prevent reading by row group.
SUFFIX = re.compile(
    r"\.(?:(?P<text>jsonl|ndjson|json|csv|tsv|txt)(?:\.(?P<codec>gz|zst|bz2|xz))?"
    r"|(?P<table>parquet|arrow|feather))$"
)
CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "xz": "xz"}
# Column separator of the formats with a header line.
SEPARATORS = {"csv": ",", "tsv": "\t"}
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv, .txt (also .gz, .zst, .bz2, .xz), .parquet, .arrow, .feather"


def shard_suffix(name: str) -> str | None:
    """Return the lowercase suffix with format and compression; None if ingest cannot read the file.

    Example:
        >>> shard_suffix("chats.v2.CSV.gz"), shard_suffix("a.parquet"), shard_suffix("notes.docx")
        ('.csv.gz', '.parquet', None)
    """
    found = SUFFIX.search(name.lower())
    return found[0] if found else None


def split_suffix(suffix: str) -> tuple[str, str | None]:
    """Return the format and codec of a suffix from `shard_suffix`.

    Example:
        >>> split_suffix(".jsonl.zst"), split_suffix(".parquet")
        (('jsonl', 'zstd'), ('parquet', None))
    """
    found = SUFFIX.fullmatch(suffix)
    if not found:
        raise ValueError(f"{suffix!r} is not one of {READABLE}")
    return found["text"] or found["table"], CODECS.get(found["codec"] or "")
