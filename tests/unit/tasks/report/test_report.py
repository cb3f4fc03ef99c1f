"""What the report computes: intervals, differences, moved items, curves, changes and examples."""

import math
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.files import write_rows
from tasks.report.chart import draw
from tasks.report.compare import SliceChange, compare, find_moves, pair
from tasks.report.examples import accepted_paraphrases, rejected_paraphrases
from tests.helpers.gate import PARAMS
from tests.helpers.report import REJECTED, heldout, messages, night_scores, score, write_examples


def lines(rows: list[dict[str, Any]], benchmark: str = "facts", group: int = 0) -> dict[str, Any]:
    """Return label -> (items, mean, low, high) for one group of a benchmark."""
    found = {one.name: one for one in compare(rows, "champion", PARAMS)}[benchmark].groups[group]
    return {
        line.label: (line.items, *(round(value, 3) for value in (line.mean, line.low, line.high)))
        for line in found.lines
    }


def test_binary_scores_have_wilson_intervals() -> None:
    found = lines(night_scores())
    # Wilson (1927) intervals for 2, 5 and 8 of 10 at 95%.
    assert found["base"] == (10, 0.2, 0.057, 0.51)
    assert found["champion"] == (10, 0.5, 0.237, 0.763)
    assert found["candidate"] == (10, 0.8, 0.49, 0.943)


def test_graded_scores_have_an_interval_around_their_mean() -> None:
    found = lines([score("candidate", i, i / 9) for i in range(10)])
    items, mean, low, high = found["candidate"]
    assert (items, mean) == (10, 0.5)
    assert 0.2 < low < 0.4
    assert 0.6 < high < 0.8


def test_a_held_out_loss_is_weighted_by_tokens_and_lower_is_better() -> None:
    found = lines(night_scores(), "test")
    # 33 nats over 14 tokens: 8 over 4 in one example, 25 over 10 in the other.
    assert found["candidate"] == (2, 2.357, 2.0, 2.5)
    label = "candidate \N{MINUS SIGN} champion"
    # One nat less over 14 tokens: two less over 4 in one example, one more over 10 in the other.
    assert found[label] == (2, -0.071, -0.5, 0.1)
    moves = find_moves(pair([row for row in night_scores() if row["benchmark"] == "test"], "champion"))
    assert [(move["item"], move["score_before"], move["score_after"]) for move in moves.gains] == [
        ("t1", 2.5, 2.0)
    ]
    assert [move["item"] for move in moves.regressions] == ["t2"]


def test_a_single_example_has_a_loss_but_no_interval() -> None:
    found = compare([heldout("candidate", "t1", 8.0, 4)], "base", PARAMS)[0].groups[0].lines[0]
    assert found.mean == 2.0
    assert math.isnan(found.low)


def test_slices_follow_the_whole_benchmark() -> None:
    found = compare(night_scores(), "champion", PARAMS)
    assert [(one.name, [group.name for group in one.groups]) for one in found] == [
        ("facts", ["", "even", "odd"]),
        ("test", [""]),
    ]
    assert [line.label for line in found[0].groups[1].lines] == [
        "base",
        "champion",
        "candidate",
        "retrieval",
        "candidate \N{MINUS SIGN} champion",
    ]
    assert lines(night_scores(), group=2)["candidate"][:2] == (5, 0.8)
    assert found[0].groups[0].chance == 0.25
    assert found[1].groups[0].chance is None


def test_the_largest_slices_are_shown_and_the_others_counted() -> None:
    rows = [score("candidate", i, 1.0, slice=f"s{i % 30 + (i > 90)}") for i in range(120)]
    found = compare(rows, "base", PARAMS)[0]
    assert (len(found.groups), found.hidden) == (21, 11)
    assert "s30" not in [group.name for group in found.groups]


def test_the_change_of_every_slice_is_known_even_if_the_slice_is_not_shown() -> None:
    rows = [score("champion", i, 1.0, slice=f"s{i % 30}") for i in range(120)]
    rows += [score("candidate", i, float(i % 30 != 29 or i > 60), slice=f"s{i % 30}") for i in range(120)]
    found = compare(rows, "champion", PARAMS)[0]
    assert (len(found.groups), found.hidden, len(found.changes)) == (21, 10, 30)
    assert found.changes[0] == SliceChange("facts/s29", 4, -0.5)
    assert {one.mean for one in found.changes[1:]} == {0.0}
    # A single slice is the whole benchmark; the sources of the held-out examples are no slices.
    assert compare([score("candidate", 0, 1.0)], "base", PARAMS)[0].changes == []
    assert compare(night_scores(), "champion", PARAMS)[1].changes == []


def test_a_benchmark_knows_its_gain_its_items_and_the_score_of_each_model() -> None:
    facts, heldout = compare(night_scores(), "champion", PARAMS)
    assert (facts.asked, facts.gain, heldout.gain) == (10, pytest.approx(0.3), pytest.approx(1 / 14))
    assert (facts.mean("candidate"), facts.mean("retrieval")) == (0.8, 0.6)
    assert math.isnan(facts.mean("other"))
    rows = [score("candidate", i, None, status="error") for i in range(3)]
    unscored = compare(rows, "base", PARAMS)[0]
    assert (unscored.asked, unscored.change, unscored.gain) == (3, None, 0.0)
    assert math.isnan(unscored.mean("candidate"))


def test_a_retention_benchmark_is_compared_with_the_base() -> None:
    params = PARAMS.model_copy(update={"retention": {"facts": 0.1}})
    labels = [line.label for line in compare(night_scores(), "champion", params)[0].groups[0].lines]
    assert labels[-1] == "candidate \N{MINUS SIGN} base"


def test_an_item_without_a_score_is_excluded_from_means_and_pairs_and_counted() -> None:
    rows = night_scores()
    broken = next(row for row in rows if (row["model"], row["item"]) == ("candidate", "q0"))
    broken |= {"score": None, "status": "error", "answer": "too long for the model"}
    group = compare(rows, "champion", PARAMS)[0].groups[0]
    found = {line.label: line for line in group.lines}
    assert (found["candidate"].items, found["candidate"].unscored) == (9, {"error": 1})
    assert found["candidate"].mean == pytest.approx(8 / 9)
    assert found["candidate \N{MINUS SIGN} champion"].items == 9


def test_a_model_without_scores_is_listed() -> None:
    rows = [score("candidate", i, None, status="error") for i in range(3)]
    found = compare(rows, "base", PARAMS)[0].groups[0].lines
    assert [(line.label, line.items, line.unscored) for line in found] == [("candidate", 0, {"error": 3})]
    assert math.isnan(found[0].mean)


def test_at_most_ten_items_in_each_direction_are_listed_the_largest_first() -> None:
    rows = [score("champion", i, 0.5) for i in range(30)]
    rows += [score("candidate", i, (i % 3) / 2, slice=f"s{i}") for i in range(29)]
    rows += [score("candidate", 29, 0.9)]
    moves = find_moves(pair(rows, "champion"))
    assert (moves.n_gains, moves.n_regressions, moves.n_equal) == (10, 10, 10)
    assert (len(moves.gains), len(moves.regressions)) == (10, 10)
    assert [move["score_after"] for move in moves.gains] == [1.0] * 9 + [0.9]
    first = moves.gains[0]
    assert (first["before"], first["answer"]) == (
        f"champion says {first['item'][1:]}",
        f"candidate says {first['item'][1:]}",
    )
    # Ties are not sorted by name.
    assert [move["item"] for move in moves.regressions] != sorted(move["item"] for move in moves.regressions)


def test_a_curve_skips_non_finite_values_and_needs_at_least_one_point() -> None:
    assert draw("loss", {"training": []}) is None
    assert draw("loss", {"training": [(1, math.nan)]}) is None
    chart = draw("loss", {"training": [(1, math.inf), (2, 2.0), (3, 1.0)], "validation": []})
    assert chart
    assert [line.label for line in chart.lines] == ["training"]
    # The corners of the plot area; SVG's y axis starts at the top.
    assert chart.lines[0].points == [(48.0, 10.0), (350.0, 184.0)]
    assert chart.description == (
        "training: 2 at optimizer step 2, lowest 1 at optimizer step 3, 1 at optimizer step 3"
    )


def test_a_single_point_is_centred() -> None:
    chart = draw("loss", {"validation": [(3, 2.0)]})
    assert chart
    assert chart.lines[0].points == [(199.0, 97.0)]
    assert (chart.across, chart.up) == ([(199.0, "3")], [(97.0, "2")])


def test_a_paraphrase_is_shown_with_its_source(tmp_path: Path) -> None:
    write_examples(tmp_path)
    augment = tmp_path / "augment"
    accepted = accepted_paraphrases(augment / "train.parquet", augment / "scores.parquet")
    assert [(one["id"], one["parent"]["id"], one["source_similarity"]) for one in accepted] == [
        ("p1", "e1", 0.25)
    ]
    rejected = rejected_paraphrases(augment / "train.parquet", augment / "rejected.parquet")
    assert [(one["reason"], one["parent"]["messages"][0]["content"]) for one in rejected] == [
        ("name_changed", "Ask 2")
    ]


def test_each_rejection_reason_has_examples(tmp_path: Path) -> None:
    write_examples(tmp_path)
    reasons = ["copy"] * 5 + ["fact_changed"] * 5 + ["malformed_reply"]
    rows = [
        {
            "parent_id": "e3",
            "style": "reword",
            "reason": reason,
            # An unparsable reply has no messages.
            "messages": [] if reason == "malformed_reply" else messages("Ask three", str(number)),
            "source_similarity": None,
        }
        for number, reason in enumerate(reasons)
    ]
    file = tmp_path / "rejected.parquet"
    write_rows(file, rows, REJECTED)
    found = rejected_paraphrases(tmp_path / "augment" / "train.parquet", file)
    assert [one["reason"] for one in found] == ["copy"] * 2 + ["fact_changed"] * 2 + ["malformed_reply"]
    write_rows(file, [], REJECTED)
    assert rejected_paraphrases(tmp_path / "augment" / "train.parquet", file) == []
