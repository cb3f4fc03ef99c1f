"""Turn raw shards into checked examples: data/raw -> data/ingest.

A shard is JSON Lines, a JSON array, CSV or Parquet, and each row of it may have any of the usual
shapes. Every row becomes an example or stands in quarantine.jsonl with its origin, the reason and the
remedy; the two add up to the rows read.
"""

from typing import Literal

from nightshift.core.config import Count, StageParams
from nightshift.data.drops import Rate


class IngestParams(StageParams):
    """Limits on sizes, on bad rows, and what happens to personal data.

    Attributes:
        max_drop_rate: Rate of bad rows, 0 to 1, among all and in each source, above which the stage fails.
        max_row_bytes: Longest row, bytes; a longer one goes to quarantine.
        max_shard_bytes: Largest shard, bytes after decompression; a larger one fails the stage.
        max_compression_ratio: Bytes out for each byte in, above which a shard counts as a bomb.
        max_tokens: Longest example, tokens of the base's tokenizer; None sets no limit.
        pii: Personal data: report where it stands, redact it, or drop the row.
        pii_model: spaCy model, by name or folder, that finds names and places too; None for rules alone.
    """

    max_drop_rate: Rate
    max_row_bytes: Count
    max_shard_bytes: Count
    max_compression_ratio: Count
    max_tokens: Count | None
    pii: Literal["report", "redact", "drop"]
    pii_model: str | None
