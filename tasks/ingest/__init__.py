"""Turn raw shards into checked examples: data/raw -> data/ingest.

A shard is JSON, CSV, text, Parquet or Arrow, and each of its rows may have any of the usual formats.
Every row becomes an example or is written to quarantine.jsonl with its origin, reason and
remedy; the two counts add up to the rows read.
"""

from typing import Annotated, Literal

from pydantic import Field

from nightshift.core.config import Count, StageParams
from nightshift.data.drops import Rate


class IngestParams(StageParams):
    """Limits on sizes and bad rows, repairs, and the handling of personal data.

    Attributes:
        max_drop_rate: Rate of bad rows, 0 to 1, overall and per source, above which the stage fails.
        max_row_bytes: Longest row, in bytes; a longer row is quarantined.
        max_shard_bytes: Largest shard, in bytes after decompression; a larger shard fails the stage.
        max_compression_ratio: Output bytes per input byte above which a shard is a decompression bomb.
        max_tokens: Longest example, in tokens of the base model's tokenizer; None for no limit.
        fix_encoding: Whether wrongly decoded text (mojibake) is repaired.
        pii: Handling of personal data: report its position, redact it, or drop the row.
        pii_model: spaCy model, by name or folder, that also finds names and places; None for rules only.
    """

    max_drop_rate: Rate
    max_row_bytes: Count
    max_shard_bytes: Count
    max_compression_ratio: Count
    max_tokens: Count | None
    fix_encoding: Annotated[bool, Field(strict=True)]
    pii: Literal["report", "redact", "drop"]
    pii_model: str | None
