"""Run the stage: propose, check, write train with its accepted paraphrases."""

from collections import Counter
from typing import Any

import pyarrow as pa

from tasks.augment import AugmentParams
from tasks.augment.quality import find_violation
from tasks.augment.rules import propose
from tasks.config import load_params
from tasks.errors import DataError
from tasks.files import read_rows, text_digest, write_rows
from tasks.schemas import AUGMENTED, MESSAGES
from tasks.stage import DATA, run_main, write_summary

SOURCE = DATA / "split" / "train.parquet"
TARGET = DATA / "augment" / "train.parquet"
REJECTED = DATA / "augment" / "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [
        ("parent_id", pa.string()),
        ("style", pa.string()),
        ("reason", pa.string()),
        ("messages", MESSAGES),
    ]
)
Row = dict[str, Any]


def main() -> None:
    """Write every original followed by its paraphrases, and what was rejected with its reason."""
    params = load_params(AugmentParams, "augment")
    examples = read_rows(SOURCE)
    augmented: list[Row] = []
    rejected: list[Row] = []
    for example in examples:
        augmented.append({**example, "parent_id": None, "style": None, "ordinal": None})
        if example["source"] in params.sources:
            accepted, refused = paraphrase(example, params.paraphrases_per_example, params.max_similarity)
            augmented += accepted
            rejected += refused
    added = len(augmented) - len(examples)
    require_acceptance(added, len(rejected), params.min_acceptance_rate)
    write_rows(TARGET, augmented, AUGMENTED)
    write_rows(REJECTED, rejected, REJECTED_SCHEMA)
    write_summary(
        "augment",
        rows_in=len(examples),
        added=added,
        rows_out=len(augmented),
        rejected=dict(sorted(Counter(row["reason"] for row in rejected).items())),
    )


def paraphrase(example: Row, count: int, max_similarity: float) -> tuple[list[Row], list[Row]]:
    """Paraphrase one example.

    Returns:
        Accepted rows (at most `count`, never padded with copies) and rejected ones.
    """
    accepted: list[Row] = []
    rejected: list[Row] = []
    for style, messages in propose(example["messages"], count):
        siblings = [row["messages"] for row in accepted]
        reason = find_violation(example["messages"], messages, siblings, max_similarity)
        parent = {"parent_id": example["id"], "style": style, "messages": messages}
        if reason:
            rejected.append({**parent, "reason": reason})
            continue
        ordinal = len(accepted) + 1
        accepted.append(
            {
                **example,
                **parent,
                "id": text_digest(example["id"], str(ordinal)),
                "ordinal": ordinal,
            }
        )
    return accepted, rejected


def require_acceptance(accepted: int, rejected: int, limit: float) -> None:
    """Fail when too few candidates pass.

    Raises:
        DataError: The acceptance rate is below `limit`.
    """
    proposed = accepted + rejected
    if proposed and accepted < limit * proposed:
        raise DataError(
            f"{REJECTED}: {accepted} of {proposed} paraphrases passed the quality check, less than "
            f"augment.min_acceptance_rate={limit}; read the reasons there, or choose other sources"
        )


if __name__ == "__main__":
    run_main(main)
