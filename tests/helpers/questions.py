"""Evaluation questions as the stage decontaminate reads them, and what it finds in training rows."""

from collections.abc import Iterable, Sequence
from typing import Any

from nightshift.data.benchmarks import Question
from nightshift.data.clusters import Asked
from nightshift.data.text import read_form
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate.hits import Hit, find_hits
from tasks.decontaminate.index import Index
from tasks.decontaminate.overlaps import search


def with_forms(questions: Iterable[Question]) -> list[Asked]:
    """Return questions with their forms."""
    return [(one, read_form(one.text)) for one in questions]


def hits_of(
    rows: Sequence[Any], benchmarks: Index, test: Index, params: DecontaminateParams, batch: int = 1000
) -> dict[str, Hit]:
    """Return row id -> hit of the rows, which are searched in batches."""
    batches = (rows[start : start + batch] for start in range(0, len(rows), batch))
    found = [search(some, benchmarks.passages, test.passages, params) for some in batches]
    return {row_id: hit for row_id, (_, hit) in find_hits(found, benchmarks, test, params).items()}
