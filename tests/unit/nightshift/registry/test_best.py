"""The best scores so far: those of the champion, or of the best champion before it."""

from typing import Any

from nightshift.registry.best import merge

KNOWN = {"tasks": {"facts": "t"}, "best": {"facts": {"version": 2, "task": "t"}}}


def rows(model: str, *values: float | None, benchmark: str = "facts") -> list[Any]:
    return [
        {
            "model": model,
            "benchmark": benchmark,
            "item": str(i),
            "score": value,
            "status": "skipped" if value is None else "ok",
        }
        for i, value in enumerate(values)
    ]


def version(table: list[Any], known: dict[str, Any] = KNOWN, benchmark: str = "facts") -> int:
    found, about = merge(table, 5, known)[benchmark]
    assert {row["model"] for row in found} == {"best" if about["version"] == 2 else "candidate"}
    return int(about["version"])


def test_the_version_with_more_right_answers_is_the_best_and_an_equal_one_the_newer() -> None:
    assert version(rows("candidate", 1, 1, 0) + rows("best", 1, 0, 0)) == 5
    assert version(rows("candidate", 1, 0, 0) + rows("best", 1, 1, 0)) == 2
    assert version(rows("candidate", 1, 0, 0) + rows("best", 0, 1, 0)) == 5
    assert version(rows("candidate", 1, 0, 0)) == 5


def test_only_items_that_both_were_asked_count() -> None:
    assert version(rows("candidate", 1, 0, 1, 1) + rows("best", 1, 1)) == 2
    assert version(rows("candidate", 1, 1, None) + rows("best", 1, 1, 1)) == 5


def test_of_the_losses_the_lower_is_the_better() -> None:
    known = {"tasks": {}, "best": {"test": {"version": 2, "task": None}}}
    lower = rows("best", 9.0, 4.0, benchmark="test")
    assert version(rows("candidate", 9.5, 4.0, benchmark="test") + lower, known, "test") == 2
    assert version(rows("candidate", 8.5, 4.0, benchmark="test") + lower, known, "test") == 5


def test_each_benchmark_has_its_own_best_version_and_the_digest_of_its_task() -> None:
    table = rows("candidate", 0, 1) + rows("best", 1, 1) + rows("candidate", 1, benchmark="new")
    found = merge([*table, *rows("base", 1, 1)], 5, {**KNOWN, "tasks": {"facts": "t", "new": "n"}})
    assert {name: about for name, (_, about) in found.items()} == {
        "facts": {"version": 2, "task": "t"},
        "new": {"version": 5, "task": "n"},
    }
