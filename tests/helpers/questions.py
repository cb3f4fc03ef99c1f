"""Evaluation questions as the stage decontaminate reads them."""

from collections.abc import Iterable

from nightshift.data.benchmarks import Question
from nightshift.data.clusters import Asked
from nightshift.data.text import read_form


def with_forms(questions: Iterable[Question]) -> list[Asked]:
    """Return questions with their forms."""
    return [(one, read_form(one.text)) for one in questions]
