"""The last page of a run."""

from typing import Any

from flows.scoreboard import rows

BOARD: dict[str, Any] = {
    "gate": {
        "verdict": "promote",
        "reason": "better",
        "reference": "base",
        "gain": {"mean": 0.15, "low": 0.0889, "high": 0.2167, "alpha": 0.05},
    },
    "metrics": {
        "base": {"facts": {"accuracy": 0.4833, "items": 180}, "test": {"loss": 2.987}},
        "candidate": {
            "facts": {"accuracy": 0.6333, "items": 180, "chance": 0.25},
            "test": {"loss": 2.2686},
        },
        "retrieval": {"facts": {"accuracy": 0.8}},
    },
    "tokens_per_second": 349.6,
    "version": 2,
    "promoted": True,
    "waits": None,
    "champion": 1,
}


def test_the_scoreboard_tells_the_gain_with_its_interval_beside_chance() -> None:
    assert rows(BOARD) == [
        ("facts: base", "48.3% of 180 questions"),
        ("facts: new model", "63.3%"),
        ("facts: base with documents", "80.0%"),
        ("facts: chance", "25.0%"),
        ("gain over the base", "+15.0%, 95% interval +8.9% to +21.7%"),
        ("held-out loss", "2.987 -> 2.269"),
        ("training speed", "350 tokens/s"),
        ("gate", "promote: better"),
        ("registered version", "2"),
        ("champion", "version 2"),
    ]


def test_what_has_no_score_is_no_number() -> None:
    broken = {"facts": {"accuracy": None, "items": 0, "chance": None}, "test": {"loss": None}}
    table = dict(rows({**BOARD, "metrics": {"base": BOARD["metrics"]["base"], "candidate": broken}}))
    assert (table["facts: new model"], table["held-out loss"]) == ("none", "2.987 -> none")
    assert "facts: chance" not in table


def test_a_verdict_without_a_comparison_has_no_gain_and_keeps_the_champion() -> None:
    board = {**BOARD, "promoted": False, "gate": {"verdict": "hold", "reason": "same"}, "waits": "manual"}
    table = dict(rows(board))
    assert table["waits for a person"] == "manual"
    assert "gain over the base" not in table
    assert table["champion"] == "version 1"
    assert table["gate"] == "hold: same"


def test_an_interval_that_could_not_be_computed_is_no_number() -> None:
    gain = {"mean": 0.15, "low": None, "high": None, "alpha": 0.05}
    table = dict(rows({**BOARD, "gate": {**BOARD["gate"], "gain": gain}}))
    assert table["gain over the base"] == "+15.0%, 95% interval none to none"
