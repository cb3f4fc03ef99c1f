"""Remove exact and near duplicates: data/ingest -> data/dedupe.

Daft signs and groups (MinHash LSH); every candidate pair is then verified by its exact Jaccard
similarity, because signatures alone would remove many texts that only look alike. The first to
arrive stays, so that yesterday's survivors never change. Jaccard 0.8 on word 3-shingles means that
about 4 % of the words differ.

Sources: Broder (1997) for MinHash; Leskovec et al., Mining of Massive Datasets, ch. 3, for banding.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import daft
import pyarrow as pa
from daft.functions import chunk
from pydantic import Field, model_validator

from tasks.config import StageParams, load_params
from tasks.files import read_rows, text_digest, write_rows
from tasks.schemas import GROUPED
from tasks.stage import DATA, run_main, write_summary
from tasks.text import canonical_messages, jaccard, shingles

SOURCE = DATA / "ingest" / "examples.parquet"
TARGET = DATA / "dedupe" / "examples.parquet"
REMOVED = DATA / "dedupe" / "removed.parquet"

REMOVED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kept_id", pa.string()),
        ("jaccard", pa.float64()),
        ("reason", pa.string()),
    ]
)


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
    """

    num_perm: Annotated[int, Field(strict=True, ge=16)]
    bands: Annotated[int, Field(strict=True, ge=1)]
    rows_per_band: Annotated[int, Field(strict=True, ge=1)]
    shingle_size: Annotated[int, Field(strict=True, ge=1)]
    jaccard_threshold: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(strict=True, ge=0)]

    @model_validator(mode="after")
    def _bands_fill_the_signature(self) -> "DedupeParams":
        if self.bands * self.rows_per_band != self.num_perm:
            raise ValueError(
                f"bands * rows_per_band must equal num_perm, got {self.bands} * "
                f"{self.rows_per_band} != {self.num_perm}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Removal:
    """Why one text goes: the index of the text that stays, and their exact similarity."""

    kept: int
    jaccard: float
    reason: str


def main() -> None:
    """Remove duplicates; give every survivor the group id of its content."""
    params = load_params(DedupeParams, "dedupe")
    examples = read_rows(SOURCE)
    texts = [canonical_messages(example["messages"]) for example in examples]
    removals = find_duplicates(texts, params)
    survivors = [
        {**example, "group_id": text_digest(texts[i])}
        for i, example in enumerate(examples)
        if i not in removals
    ]
    write_rows(TARGET, survivors, GROUPED)
    write_rows(REMOVED, _removed_rows(examples, removals), REMOVED_SCHEMA)
    write_summary(
        "dedupe",
        rows_in=len(examples),
        rows_out=len(survivors),
        dropped=Counter(removal.reason for removal in removals.values()),
        rows_out_by_source=dict(Counter(row["source"] for row in survivors)),
    )


def find_duplicates(texts: Sequence[str], params: DedupeParams) -> dict[int, Removal]:
    """Find the texts that repeat an earlier survivor.

    Args:
        texts: Canonical texts in order of arrival, shape (n,).
        params: MinHash parameters.

    Returns:
        index -> removal, for every text that goes. The first of equal texts always stays. O(n) time
        apart from the verified candidates; deterministic.
    """
    first: dict[str, int] = {}
    removals = {
        i: Removal(first[text], 1.0, "exact_duplicate")
        for i, text in enumerate(texts)
        if first.setdefault(text, i) != i
    }
    unique = sorted(first.values())
    buckets = band_buckets({i: texts[i] for i in unique}, params)
    survivors: dict[int, list[int]] = defaultdict(list)
    sets = {i: shingles(texts[i], params.shingle_size) for i in unique}
    for i in unique:
        candidates = sorted({other for bucket in buckets[i] for other in survivors[bucket]})
        for other in candidates:
            if (similarity := jaccard(sets[i], sets[other])) >= params.jaccard_threshold:
                removals[i] = Removal(other, similarity, "near_duplicate")
                break
        else:
            for bucket in buckets[i]:
                survivors[bucket].append(i)
    return removals


def band_buckets(texts: dict[int, str], params: DedupeParams) -> dict[int, list[int]]:
    """Sign the texts on Daft and return the LSH buckets that each shares with another text.

    Args:
        texts: index -> canonical text.
        params: MinHash parameters.

    Returns:
        index -> sorted bucket numbers; empty when no other text shares a band.
    """
    if not texts:
        return {}
    frame = daft.from_pydict({"index": list(texts), "text": list(texts.values())})
    signature = daft.col("text").minhash(
        num_hashes=params.num_perm,
        ngram_size=params.shingle_size,
        seed=params.seed,
        hash_function="xxhash3_64",
    )
    shared = (
        frame.select(daft.col("index"), chunk(signature, params.rows_per_band).alias("band"))
        .explode("band")
        .select(daft.col("index"), daft.col("band").hash().alias("bucket"))
        .groupby("bucket")
        .agg(daft.col("index").list_agg().alias("members"))
        .where(daft.col("members").list_count() > 1)
        .to_pydict()
    )
    buckets: dict[int, list[int]] = {index: [] for index in texts}
    for bucket, members in sorted(zip(shared["bucket"], shared["members"], strict=True)):
        for index in set(members):
            buckets[index].append(bucket)
    return buckets


def _removed_rows(examples: list[dict[str, Any]], removals: dict[int, Removal]) -> list[dict[str, Any]]:
    """Name each removed example and the one that stays for it."""
    return [
        {
            "id": examples[i]["id"],
            "kept_id": examples[removal.kept]["id"],
            "jaccard": removal.jaccard,
            "reason": removal.reason,
        }
        for i, removal in sorted(removals.items())
    ]


if __name__ == "__main__":
    run_main(main)
