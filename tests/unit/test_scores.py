"""Aggregates over items."""

from tasks.evaluate.scores import metrics


def row(model: str, benchmark: str, score: float, **more: object) -> dict[str, object]:
    kind = {"slice": "s", "tokens": None, "choices": 4, "item": "i"}
    return {"model": model, "benchmark": benchmark, "score": score, **kind, **more}


def test_accuracy_stands_beside_chance_and_slices() -> None:
    rows = [row("m", "facts", 1.0, slice="a"), row("m", "facts", 0.0, slice="b", choices=2)]
    assert metrics(rows) == {
        "m": {
            "facts": {
                "accuracy": 0.5,
                "items": 2,
                "chance": 0.375,
                "slices": {"a": 1.0, "b": 0.0},
            }
        }
    }


def test_the_heldout_loss_is_weighted_by_tokens_not_by_examples() -> None:
    rows = [row("m", "test", 10.0, tokens=1), row("m", "test", 9.0, tokens=9)]
    assert metrics(rows)["m"]["test"] == {"loss": 1.9, "items": 2, "tokens": 10}
