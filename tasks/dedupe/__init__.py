"""Remove exact and near duplicates: data/ingest -> data/dedupe.

Daft computes MinHash signatures, locally or on a Ray cluster. Every candidate pair is then verified by
its exact Jaccard similarity, because signatures alone produce many false positives. The first row to
arrive stays, so that yesterday's survivors never change.
"""

from typing import Annotated

from pydantic import Field, model_validator

from nightshift.core.config import Count, StageParams
from nightshift.data.drops import Rate


class DedupeParams(StageParams):
    """MinHash LSH parameters.

    Attributes:
        num_perm: Permutations per signature.
        bands: Bands of the LSH index; bands * rows_per_band = num_perm. More bands find more pairs
            and cost more verification.
        rows_per_band: Signature values per band.
        shingle_size: Words per shingle.
        jaccard_threshold: Exact Jaccard similarity, 0 to 1, from which a text is a duplicate.
        seed: Seed of the permutations.
        max_drop_rate: Highest rate of rows whose content is lost, 0 to 1, overall and per source.
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
