"""Remove exact and near duplicates: data/ingest -> data/dedupe.

Daft signs (MinHash), on this machine or on a Ray cluster; every candidate pair is then verified by its
exact Jaccard similarity, because signatures alone would remove many texts that only look alike. The
first to arrive stays, so that yesterday's survivors never change.
"""

from typing import Annotated

from pydantic import Field, model_validator

from nightshift.core.config import Count, StageParams
from nightshift.data.drops import Rate


class DedupeParams(StageParams):
    """MinHash LSH.

    Attributes:
        num_perm: Permutations of a signature.
        bands: Bands of the LSH index; bands * rows_per_band = num_perm. More bands find more pairs
            and cost more verification.
        rows_per_band: Signature values in one band.
        shingle_size: Words in a shingle.
        jaccard_threshold: Exact similarity, 0 to 1, from which a text counts as a duplicate.
        seed: Seed of the permutations.
        max_drop_rate: Rate of rows, 0 to 1, among all and in each source, that may go with their content.
    """

    num_perm: Annotated[int, Field(strict=True, ge=16)]
    bands: Count
    rows_per_band: Count
    shingle_size: Count
    jaccard_threshold: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(strict=True, ge=0)]
    max_drop_rate: Rate

    @model_validator(mode="after")
    def _bands_fill_the_signature(self) -> "DedupeParams":
        if self.bands * self.rows_per_band != self.num_perm:
            raise ValueError(
                f"bands * rows_per_band must equal num_perm, got {self.bands} * "
                f"{self.rows_per_band} != {self.num_perm}"
            )
        return self
