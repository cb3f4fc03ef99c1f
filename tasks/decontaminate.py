"""Remove from train what asks an evaluation question: data/augment -> data/decontaminate.

Runs after augmentation, because a paraphrase may land on a held-out wording. A train row is a hit
when one of its user turns equals an evaluation question after normalisation, or shares an n-gram
with it. Equal answers never count: a fact must be in train to be learned.

Source: n-gram overlap as in GPT-3 (arXiv 2005.14165, appendix C).
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from tasks.config import StageParams, load_params
from tasks.errors import DataError
from tasks.files import read_jsonl, read_rows, write_rows
from tasks.schemas import AUGMENTED
from tasks.stage import DATA, run_main, write_summary
from tasks.text import canonical, shingles

SOURCE = DATA / "augment" / "train.parquet"
TEST = DATA / "split" / "test.parquet"
BENCHMARKS = DATA / "benchmarks"
TARGET = DATA / "decontaminate" / "train.parquet"
HITS = DATA / "decontaminate" / "hits.parquet"
HITS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("reason", pa.string()),
        ("match", pa.string()),
    ]
)


class DecontaminateParams(StageParams):
    """When two questions overlap.

    Attributes:
        ngram_size: Words in the n-gram that train and an evaluation question must not share.
    """

    ngram_size: Annotated[int, Field(strict=True, ge=5)]


def main() -> None:
    """Write the clean train rows and a report that names each hit."""
    params = load_params(DecontaminateParams, "decontaminate")
    rows = read_rows(SOURCE)
    questions = index(evaluation_questions(TEST, BENCHMARKS), params.ngram_size)
    found = [find_hit(row, questions, params.ngram_size) for row in rows]
    clean = [row for row, hit in zip(rows, found, strict=True) if hit is None]
    hits = [hit for hit in found if hit is not None]
    write_rows(TARGET, clean, AUGMENTED)
    write_rows(HITS, hits, HITS_SCHEMA)
    write_summary(
        "decontaminate",
        rows_in=len(rows),
        rows_out=len(clean),
        dropped=Counter(hit["reason"] for hit in hits),
    )


def evaluation_questions(test: Path, benchmarks: Path) -> list[tuple[str, str, str]]:
    """List (benchmark, item id, question) of everything the model is evaluated on.

    Raises:
        DataError: A benchmark has no items.
    """
    questions = [
        ("test", row["id"], message["content"])
        for row in read_rows(test)
        for message in row["messages"]
        if message["role"] == "user"
    ]
    for file in sorted(benchmarks.glob("*/items.jsonl")):
        items = read_jsonl(file)
        if not items:
            raise DataError(f"{file}: no items; a benchmark needs at least one")
        questions += [(file.parent.name, str(item["id"]), item["question"]) for item in items]
    return questions


def index(questions: Iterable[tuple[str, str, str]], ngram_size: int) -> dict[str, tuple[str, str, str]]:
    """Map each whole question and each of its n-grams to (benchmark, item, reason).

    A question shorter than `ngram_size` words counts as a whole only.
    """
    table: dict[str, tuple[str, str, str]] = {}
    for benchmark, item, question in questions:
        text = canonical(question)
        if len(text.split()) >= ngram_size:
            for ngram in shingles(text, ngram_size):
                table.setdefault(ngram, (benchmark, item, "shared_ngram"))
        table[text] = (benchmark, item, "same_question")
    return table


def find_hit(
    row: dict[str, Any], questions: dict[str, tuple[str, str, str]], ngram_size: int
) -> dict[str, str] | None:
    """Report the first evaluation question that a row's user turns contain, or None."""
    for message in row["messages"]:
        if message["role"] != "user":
            continue
        text = canonical(message["content"])
        for key in [text, *sorted(shingles(text, ngram_size))]:
            if key and (found := questions.get(key)):
                benchmark, item, reason = found
                return {
                    "id": row["id"],
                    "benchmark": benchmark,
                    "item": item,
                    "reason": reason,
                    "match": key,
                }
    return None


if __name__ == "__main__":
    run_main(main)
