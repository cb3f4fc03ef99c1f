"""Tokenise, mask and pack: data/decontaminate and data/base -> data/pack.

TRL's best-fit-decreasing packer fills rows to within 0.1 % of the volume bound. For every span, a row
records the example, its position in the shard, and the first token, so that a loss can be traced back to
a line of raw data.
"""

from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field

from nightshift.core.config import StageParams
from nightshift.data.drops import Rate

TOKENS = pa.list_(pa.int32())
# seq_lengths, example_ids, origins (`source/arrival.suffix:line`) and starts (first token of the span in
# its example, 0 unless it was split) have one entry per span of the row.
ROWS = pa.schema(
    [
        ("input_ids", TOKENS),
        ("labels", TOKENS),
        ("seq_lengths", TOKENS),
        ("example_ids", pa.list_(pa.string())),
        ("origins", pa.list_(pa.string())),
        ("starts", TOKENS),
    ]
)
OverLength = Literal["error", "drop", "truncate", "split"]


class PackParams(StageParams):
    """Row size, and the handling of examples that do not fit.

    Attributes:
        packing: Whether a row holds several spans, or one.
        max_length: Tokens per row, at most.
        over_length: Handling of a longer example: fail, drop, truncate at the end, or split into spans. A
            chat is split between rounds, and a longer round is dropped.
        max_lost_token_share: Highest share of lost tokens, 0 to 1.
        max_drop_rate: Highest rate of entirely lost examples, 0 to 1, overall and per source.
        replay_share: Share, 0 to 1, of the examples that the version from which training starts was trained
            on, which is trained again; None for all.
        seed: Seed of the choice of these examples.
    """

    packing: bool
    max_length: Annotated[int, Field(strict=True, ge=8)]
    over_length: OverLength
    max_lost_token_share: Rate
    max_drop_rate: Rate
    replay_share: Rate | None
    seed: Annotated[int, Field(strict=True, ge=0)]
