"""The scoreboard at the end of a run."""

import shutil
from pathlib import Path
from typing import Any

from nightshift.core.files import write_json
from nightshift.core.paths import DATA
from nightshift.pipeline.graph import stage_order
from nightshift.pipeline.scoreboard import collect_dropped, format_rows
from tests.helpers.checkouts import ROOT

BOARD: dict[str, Any] = {
    "gate": {
        "verdict": "promote",
        "reason": "better",
        "reference": "base",
        "gain": {
            "mean": 0.15,
            "low": 0.0889,
            "high": 0.2167,
            "alpha": 0.05,
            "items": 180,
            "benchmarks": ["facts"],
        },
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
    "cpu_shares": [0.97, 0.52],
    "version": 2,
    "promoted": True,
    "waits": None,
    "champion": 1,
    "dropped": {"ingest": {"rows_in": 2144, "dropped": {"empty_content": 1, "no_final_answer": 43}}},
}


def test_the_scoreboard_shows_the_gain_with_its_interval_and_chance() -> None:
    assert format_rows(BOARD) == [
        ("facts: base", "48.3% of 180 questions"),
        ("facts: new model", "63.3%"),
        ("facts: base with retrieval", "80.0%"),
        ("facts: chance", "25.0%"),
        ("gain over the base", "+15.0 points on 180 questions of facts, 95% interval +8.9 to +21.7"),
        ("loss on the test set", "base 2.987 -> new model 2.269"),
        ("training speed", "350 tokens/s, on a CPU at least 52% of the time"),
        ("gate", "promote: better"),
        ("registered version", "2"),
        ("champion", "version 2"),
        ("dropped by ingest", "44 of 2,144 rows: empty_content 1, no_final_answer 43"),
    ]


def test_missing_scores_are_shown_as_none() -> None:
    broken = {"facts": {"accuracy": None, "items": 0, "chance": None}, "test": {"loss": None}}
    table = dict(format_rows({**BOARD, "metrics": {"base": BOARD["metrics"]["base"], "candidate": broken}}))
    assert (table["facts: new model"], table["loss on the test set"]) == (
        "none",
        "base 2.987 -> new model none",
    )
    assert "facts: chance" not in table


def test_a_verdict_without_a_comparison_has_no_gain_and_keeps_the_champion() -> None:
    board = {**BOARD, "promoted": False, "gate": {"verdict": "hold", "reason": "same"}, "waits": "manual"}
    table = dict(format_rows(board))
    assert table["awaiting approval"] == "manual; nightshift promote 2 --reason TEXT"
    assert "gain over the base" not in table
    assert table["champion"] == "version 1"
    assert table["gate"] == "hold: same"


def test_an_interval_that_could_not_be_computed_is_shown_as_none() -> None:
    gain = {"mean": 0.15, "low": None, "high": None, "alpha": 0.05, "items": 180, "benchmarks": ["facts"]}
    table = dict(format_rows({**BOARD, "gate": {**BOARD["gate"], "gain": gain}}))
    assert table["gain over the base"] == "+15.0 points on 180 questions of facts, 95% interval none to none"


LOSS_GATE: dict[str, Any] = {
    "verdict": "promote",
    "reason": "better",
    "reference": "base",
    "loss": 1.87,
    "reference_loss": 2.31,
    "gain": {
        "unit": "nats per token",
        "benchmarks": ["test"],
        "items": 120,
        "mean": 0.44,
        "low": 0.37,
        "high": 0.51,
        "alpha": 0.05,
    },
}


def test_a_gain_on_the_test_set_is_shown_as_a_lower_loss() -> None:
    scores = {"base": {"test": {"loss": 2.31}}, "candidate": {"test": {"loss": 1.87}}}
    table = dict(format_rows({**BOARD, "gate": LOSS_GATE, "metrics": scores}))
    assert table["gain over the base"] == (
        "the loss on 120 test examples fell from 2.310 to 1.870 nats per token (-19.0%, 95% interval -22.1% "
        "to -16.0%)"
    )
    assert table["loss on the test set"] == "base 2.310 -> new model 1.870"
    gain = {**LOSS_GATE["gain"], "items": 1, "low": None, "high": None}
    table = dict(format_rows({**BOARD, "gate": {**LOSS_GATE, "gain": gain}, "metrics": scores}))
    assert table["gain over the base"].endswith("(-19.0%, 95% interval none to none)")


def test_a_run_without_any_test_example_has_a_scoreboard() -> None:
    gate = {"verdict": "hold", "reason": "too few", "reference": "base", "gain": None, "loss": None}
    table = dict(format_rows({**BOARD, "gate": gate, "metrics": {}}))
    assert table["loss on the test set"] == "base none -> new model none"
    assert "gain over the base" not in table


def test_the_scoreboard_counts_the_rows_that_each_stage_dropped(in_tmp: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", in_tmp)
    for stage in stage_order():
        write_json(DATA / stage / "summary.json", {"rows_in": 0, "dropped": {}})
    write_json(DATA / "pack" / "summary.json", {"rows_in": 7, "dropped": {"over_length": 2}})
    write_json(
        DATA / "dedupe" / "summary.json",
        {"rows_in": 9, "dropped": {"near_duplicate": 1, "exact_duplicate": 2}},
    )
    assert list(collect_dropped().items()) == [
        ("dedupe", {"rows_in": 9, "dropped": {"exact_duplicate": 2, "near_duplicate": 1}}),
        ("pack", {"rows_in": 7, "dropped": {"over_length": 2}}),
    ]
