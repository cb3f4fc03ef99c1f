"""Metrics aggregated over items."""

from typing import Any

from tasks.evaluate.scores import metrics


def row(model: str, benchmark: str, score: float | None, **more: object) -> dict[str, Any]:
    kind = {"slice": "s", "tokens": None, "choices": 4, "item": "i", "status": "ok"}
    return {"model": model, "benchmark": benchmark, "score": score, **kind, **more}


def test_accuracy_is_reported_with_chance_and_slices() -> None:
    rows = [row("m", "facts", 1.0, slice="a"), row("m", "facts", 0.0, slice="b", choices=2)]
    assert metrics(rows) == {
        "m": {
            "facts": {
                "accuracy": 0.5,
                "items": 2,
                "errors": 0,
                "skipped": 0,
                "chance": 0.375,
                "slices": {"a": 1.0, "b": 0.0},
            }
        }
    }


def test_an_item_without_a_score_is_counted_and_not_averaged() -> None:
    rows = [
        row("m", "facts", 1.0),
        row("m", "facts", None, status="error"),
        row("m", "facts", None, status="skipped"),
    ]
    found = metrics(rows)["m"]["facts"]
    assert (found["accuracy"], found["items"], found["errors"], found["skipped"]) == (1.0, 1, 1, 1)
    assert metrics(rows[1:])["m"]["facts"]["accuracy"] is None


def test_a_generated_answer_has_no_chance_level() -> None:
    assert metrics([row("m", "written", 0.5, choices=None)])["m"]["written"]["chance"] is None


def test_the_heldout_loss_is_weighted_by_tokens_not_by_examples() -> None:
    rows = [row("m", "test", 10.0, tokens=1, slice="a"), row("m", "test", 9.0, tokens=9, slice="b")]
    found = metrics(rows)["m"]["test"]
    assert (found["loss"], found["tokens"], found["items"]) == (1.9, 10, 2)
    assert found["perplexity"] == 6.6859


def test_the_loss_on_examples_that_are_newer_than_the_champion_is_separate() -> None:
    rows = [row("m", "test", 2.0, tokens=4, is_new=False), row("m", "test", 9.0, tokens=3, is_new=True)]
    assert metrics(rows)["m"]["test"]["new"] == {"loss": 3.0, "perplexity": 20.0855, "tokens": 3}
    assert metrics(rows[:1])["m"]["test"]["new"] == {"loss": None, "perplexity": None, "tokens": 0}


def test_the_accuracy_of_the_answers_to_newer_examples_is_separate() -> None:
    answers = [row("m", "test_answers", float(new), is_new=new) for new in (False, True, True)]
    assert metrics(answers)["m"]["test_answers"]["new"] == 1.0
    assert metrics(answers)["m"]["test_answers"]["accuracy"] == 0.666667
    assert metrics(answers[:1])["m"]["test_answers"]["new"] is None
    assert "new" not in metrics([row("m", "facts", 1.0)])["m"]["facts"]


def test_each_source_has_a_loss_and_a_perplexity() -> None:
    rows = [
        row("m", "test", 0.0, tokens=5, slice="a"),
        row("m", "test", 9.0, tokens=9, slice="b"),
        row("m", "test", 900.0, tokens=9, slice="c"),
    ]
    assert metrics(rows)["m"]["test"]["sources"] == {
        "a": {"loss": 0.0, "perplexity": 1.0, "tokens": 5},
        "b": {"loss": 1.0, "perplexity": 2.7183, "tokens": 9},
        "c": {"loss": 100.0, "perplexity": None, "tokens": 9},
    }


def test_a_test_set_without_scores_has_no_loss() -> None:
    found = metrics([row("m", "test", None, tokens=3, status="error")])["m"]["test"]
    assert (found["loss"], found["perplexity"], found["errors"]) == (None, None, 1)
