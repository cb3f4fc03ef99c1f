"""Benchmark items over the nights."""

from typing import Any

import pytest

from nightshift.registry.items import History, find_histories


def night(**scores: float | None) -> list[Any]:
    """Return the score table of a night: item -> score of the candidate."""
    same = {"model": "candidate", "benchmark": "facts", "question": "?", "expected": "!"}
    rows = [
        {**same, "item": item, "score": score, "status": "skipped" if score is None else "ok"}
        for item, score in scores.items()
    ]
    return [*rows, {**rows[0], "model": "base"}, {**rows[0], "benchmark": "test"}]


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        ([0, 0, 0], "never right"),
        ([0.2, 0.4, 0], "never right"),
        ([1, 1, 1, 0.6], "always right"),
        ([0, 1, 0], "unstable"),
        ([0, 0, 1], ""),
        ([0, 0, 0, 1, 1, 1], ""),
        ([0, 0, 1, 1, 0, 0, 0], ""),
        ([0, 1, 1, 0, 0, 1, 1], "unstable"),
        # Two nights say nothing yet.
        ([1, 1], ""),
    ],
)
def test_an_item_has_a_kind_from_three_nights_on(scores: list[float], kind: str) -> None:
    assert History("facts", "1", "?", "!", scores).kind == kind


def test_the_scores_of_an_item_are_those_of_the_candidates_in_order() -> None:
    found = find_histories([night(a=1, b=0), night(a=0, b=None), night(a=1, b=1)])
    assert {one.item: one.scores for one in found["facts"]} == {"a": [1, 0, 1], "b": [0, 1]}
    assert list(found) == ["facts"]


def test_an_item_that_changed_starts_anew_and_one_that_is_gone_is_left_out() -> None:
    changed = night(a=0)
    changed[0]["question"] = "In other words?"
    found = find_histories([night(a=1, gone=1), changed])
    assert [(one.item, one.question, one.scores) for one in found["facts"]] == [("a", "In other words?", [0])]
