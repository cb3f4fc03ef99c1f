"""Split survivors into train, validation and test by the hash of their group: data/dedupe -> data/split.

The side of a group depends on the seed and on its content alone, so it never changes while data is
added, removed or reordered. Sources named in `by_phrasing` go to train as a whole: their facts must
be learned, and their benchmark asks for them in wordings that training never sees.
"""

import hashlib
from collections import Counter
from typing import Annotated

from pydantic import Field, model_validator

from tasks.config import StageParams, load_params
from tasks.files import read_rows, write_rows
from tasks.schemas import GROUPED
from tasks.stage import DATA, run_main, write_summary

SOURCE = DATA / "dedupe" / "examples.parquet"
TARGET = DATA / "split"
SIDES = ("train", "validation", "test")
BUCKETS = 10_000


class SplitParams(StageParams):
    """Shares of the groups.

    Attributes:
        validation_share: Share of groups for validation, 0 to 1.
        test_share: Share of groups for test, 0 to 1.
        by_phrasing: Sources whose examples all go to train.
        seed: Seed of the hash; another seed draws another split.
    """

    validation_share: Annotated[float, Field(ge=0, lt=1)]
    test_share: Annotated[float, Field(gt=0, lt=1)]
    by_phrasing: list[str]
    seed: Annotated[int, Field(strict=True, ge=0)]

    @model_validator(mode="after")
    def _something_is_left_to_train(self) -> "SplitParams":
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                "validation_share + test_share must be below 1, got "
                f"{self.validation_share} + {self.test_share}"
            )
        return self


def main() -> None:
    """Write one Parquet file for each side."""
    params = load_params(SplitParams, "split")
    examples = read_rows(SOURCE)
    sides = [
        "train" if row["source"] in params.by_phrasing else side(row["group_id"], params) for row in examples
    ]
    for name in SIDES:
        rows = [row for row, at in zip(examples, sides, strict=True) if at == name]
        write_rows(TARGET / f"{name}.parquet", rows, GROUPED)
    counts = Counter(sides)
    write_summary(
        "split",
        rows_in=len(examples),
        rows_out=len(sides),
        rows_out_by_side={name: counts[name] for name in SIDES},
    )


def side(group_id: str, params: SplitParams) -> str:
    """Return the side of one group; a pure function of the seed and the group id."""
    digest = hashlib.blake2b(f"{params.seed}|{group_id}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % BUCKETS / BUCKETS
    if bucket < params.test_share:
        return "test"
    return "validation" if bucket < params.test_share + params.validation_share else "train"


if __name__ == "__main__":
    run_main(main)
