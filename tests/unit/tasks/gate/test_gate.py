"""Checks and verdicts of the gate; errors fail closed."""

import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightshift.core.files import read_json, write_json, write_rows
from nightshift.data.schemas import ALL_SCORES, AUGMENTED, GROUPED
from nightshift.data.statistics import (
    clusters_needed,
    interval,
    margin_p_value,
    p_value,
    power,
    seed_band,
)
from tasks.gate import GateParams
from tasks.gate.__main__ import main
from tasks.gate.decision import decide
from tests.helpers.checkouts import ROOT
from tests.helpers.gate import PARAMS, unrelated

DIGESTS = {"base": None, "candidate": "c"}


def scores(
    model: str, right: int, items: int = 100, loss: float = 2.0, benchmark: str = "facts", parts: int = 1
) -> list[dict[str, Any]]:
    """Return scores in which the first items are correct; slices are contiguous and equally long."""
    rows = [
        {
            "model": model,
            "benchmark": benchmark,
            "item": f"{i:03}",
            "slice": str(i * parts // items),
            "score": float(i < right),
            "status": "ok",
            "answer": "x",
        }
        for i in range(items)
    ]
    test = {"benchmark": "test", "slice": "s", "tokens": 10, "status": "ok", "answer": None}
    tests = [{"model": model, "item": str(i), "score": loss * 10, **test} for i in range(5)]
    return rows + tests


def judge(rows: list[dict[str, Any]], overlaps: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    return decide(rows, DIGESTS, overlaps, PARAMS.model_copy(update=changes))


def verdict(candidate: list[dict[str, Any]], base: list[dict[str, Any]], **changes: Any) -> str:
    return str(judge(candidate + base, **changes)["verdict"])


def test_a_clear_gain_is_promoted_with_its_evidence() -> None:
    decision = judge(scores("candidate", 70) + scores("base", 40))
    assert (decision["verdict"], decision["reference"]) == ("promote", "base")
    gain = decision["gain"]
    assert (gain["mean"], gain["items"], gain["clusters"]) == (0.3, 100, 100)
    # 30 of 30 changed answers were won. The level is 0.05 / 365.
    assert (gain["p_value"], gain["level"]) == (pytest.approx(0.5**30), 0.000136986)
    assert gain["benchmarks"] == ["facts"]
    assert 0.2 < gain["low"] < 0.3 < gain["high"] < 0.4
    assert decision["reason"] == (
        "gain: better: +30.0 points of accuracy (95% interval +22.0 to +39.0) on 100 items"
    )
    assert [check["name"] for check in decision["checks"]] == ["gain", "facts, against base", "held-out loss"]


def test_a_small_difference_is_held_and_a_clear_loss_is_rejected() -> None:
    assert verdict(scores("candidate", 42), scores("base", 40)) == "hold"
    assert verdict(scores("candidate", 40), scores("base", 40)) == "hold"
    assert verdict(scores("candidate", 40), scores("base", 70)) == "reject"


def test_an_inconclusive_gain_reports_how_many_items_are_needed() -> None:
    # Five of 60 items won, two lost: standard deviation 0.34, so a gain of 0.05 would rarely show.
    base = scores("base", 20, 60)
    candidate = scores("candidate", 25, 60)
    candidate[0]["score"] = candidate[1]["score"] = 0.0
    reason = judge(candidate + base, detectable_gain=0.05)["reason"]
    assert reason.startswith("gain: not shown: +5.0 points of accuracy (95% interval ")
    assert reason.endswith(
        "; a gain of 5.0 points would be found with probability 1%, with 939 items with probability 80%"
    )
    assert judge(candidate + base, detectable_gain=0.05)["gain"]["items_needed"] == 939


def test_a_gain_does_not_compensate_a_worse_heldout_loss() -> None:
    assert verdict(scores("candidate", 70, loss=2.11), scores("base", 40)) == "reject"
    assert verdict(scores("candidate", 70, loss=2.09), scores("base", 40)) == "promote"


def test_a_floor_applies_whatever_the_gain() -> None:
    rows = scores("candidate", 70) + scores("base", 40)
    assert judge(rows, floors={"facts": 0.7})["verdict"] == "promote"
    decision = judge(rows, floors={"facts": 0.71})
    assert (decision["verdict"], decision["reason"]) == ("reject", "facts, floor: 70.0%, minimum 71.0%")


def test_a_slice_that_became_worse_rejects_a_gain() -> None:
    # One of five slices with 40 items each falls from 40 to 20 correct answers; the others rise.
    candidate = scores("candidate", 200, 200, parts=5)
    for row in candidate[:20]:
        row["score"] = 0.0
    decision = judge(candidate + scores("base", 40, 200, parts=5))
    assert decision["verdict"] == "reject"
    assert decision["reason"] == (
        "slices: 1 of 5 significantly worse by more than 5.0 points; facts/0 -50.0 points on 40 items "
        "(p 9.5e-07)"
    )


def test_the_test_of_every_slice_is_stored() -> None:
    # Of five slices with 40 items each, the first falls from 40 to 20 correct answers, the second to 37.
    candidate = scores("candidate", 200, 200, parts=5)
    for row in (*candidate[:20], *candidate[40:43]):
        row["score"] = 0.0
    first, second, *others = judge(candidate + scores("base", 80, 200, parts=5))["slices"]
    assert (first["name"], first["items"], first["mean"], first["is_worse"]) == ("facts/0", 40, -0.5, True)
    # 20 of 20 changed answers were lost, and 3 of 3.
    assert (first["p_value"], second["p_value"]) == (0.5**20, 0.5**3)
    assert (second["mean"], second["is_worse"]) == (-0.075, False)
    assert [one["mean"] for one in others] == [1.0, 1.0, 1.0]
    # A single slice is the whole benchmark.
    assert judge(scores("candidate", 70) + scores("base", 40))["slices"] == []


def test_a_slice_that_is_worse_by_chance_does_not_reject() -> None:
    candidate = scores("candidate", 200, 200, parts=5)
    for row in candidate[:4]:
        row["score"] = 0.0
    # Four of 40 lost have p = 0.06, which Holm's correction raises to 0.31.
    decision = judge(candidate + scores("base", 40, 200, parts=5))
    assert decision["verdict"] == "promote"
    (message,) = (check["message"] for check in decision["checks"] if check["name"] == "slices")
    assert message == (
        "none of 5 significantly worse by more than 5.0 points; not significant: facts/0 -10.0 points "
        "on 40 items (p 0.062)"
    )


def test_the_level_is_that_of_one_candidate_among_many() -> None:
    rows = scores("candidate", 48) + scores("base", 40)
    # Eight of eight changed answers were won: p is 1 / 256.
    assert judge(rows, nights=12)["verdict"] == "promote"
    held = judge(rows, nights=13)
    assert held["verdict"] == "hold"
    assert "; p 0.00391 exceeds 0.00385 (gate.alpha / gate.nights); a gain of 10.0 points " in held["reason"]


def test_retention_must_be_proven() -> None:
    gain = scores("candidate", 70) + scores("base", 40)

    def keep(right: int) -> dict[str, Any]:
        rows = [row for row in scores("candidate", right, 400, benchmark="general") if "tokens" not in row]
        rows += [row for row in scores("base", 200, 400, benchmark="general") if "tokens" not in row]
        return judge(gain + rows, retention={"general": 0.05})

    kept = [keep(right) for right in (200, 196, 186, 150)]
    assert [decision["verdict"] for decision in kept] == ["promote", "promote", "hold", "reject"]
    assert kept[2]["reason"].startswith("general, against base: -3.5 points of accuracy (95% interval -")
    assert kept[2]["reason"].endswith("; the loss may exceed the allowed 5.0 points (p 0.084 exceeds 0.05)")
    assert kept[3]["reason"].endswith("; lost more than the allowed 5.0 points")
    # The accepted loss is set per benchmark: 50 of 400 items are lost, and 20% may be.
    rows = [row for row in scores("candidate", 150, 400, benchmark="general") if "tokens" not in row]
    rows += [row for row in scores("base", 200, 400, benchmark="general") if "tokens" not in row]
    assert judge(gain + rows, retention={"general": 0.2})["verdict"] == "promote"


def test_retention_without_scores_of_the_base_is_an_error() -> None:
    digests = {"base": None, "candidate": "c", "champion": "d"}
    rows = scores("candidate", 70) + scores("champion", 40)
    for model in ("candidate", "champion"):
        rows += [row for row in scores(model, 90, benchmark="general") if "tokens" not in row]
    params = PARAMS.model_copy(update={"retention": {"general": 0.1}})
    decision = decide(rows, digests, (), params)
    assert (decision["verdict"], decision["reason"]) == (
        "error",
        "scores: 100 items are scored for only one model; rerun evaluate",
    )


def test_losses_are_compared_on_the_same_texts_whatever_the_tokenizers() -> None:
    ours, theirs = scores("candidate", 70, loss=2.0), scores("base", 40, loss=2.0)
    for row in theirs:
        if "tokens" in row:
            # The same texts in half as many tokens with a 20% higher loss: 4.8 nats per token.
            row |= {"tokens": 5, "score": 24.0}
    decision = judge(ours + theirs)
    assert (decision["loss"], decision["reference_loss"]) == (2.0, 2.4)
    assert decision["verdict"] == "promote"
    for row in theirs:
        if "tokens" in row:
            row["score"] = 16.0
    assert judge(ours + theirs)["reason"].startswith("held-out loss: 2.000 nats per token, reference 1.6")


def test_on_two_bases_an_item_that_one_model_cannot_read_is_skipped_for_both() -> None:
    digests = {"base": None, "candidate": "c", "champion": "d on the base b"}
    ours, theirs = scores("candidate", 70), scores("champion", 40)

    def judged() -> dict[str, Any]:
        return decide(ours + theirs, digests, [], PARAMS, is_same_base=False)

    unread = {"status": "skipped", "score": None, "answer": "longer than the model's context of 64 tokens"}
    theirs[99] |= unread
    assert (judged()["verdict"], judged()["gain"]["items"]) == ("promote", 99)
    ours[98] |= unread
    assert (judged()["verdict"], judged()["gain"]["items"]) == ("hold", 98)
    assert judged()["reason"] == (
        "unread: 1 items that the champion answered were skipped for both models, first: facts/098: longer "
        "than the model's context of 64 tokens"
    )


def test_a_behaviour_benchmark_only_rejects() -> None:
    rows = scores("candidate", 70) + scores("base", 40)

    def behaves(candidate: int, base: int, **changes: Any) -> str:
        more = scores("candidate", candidate, 60, benchmark="reworded")
        more += scores("base", base, 60, benchmark="reworded")
        more = [row for row in more if "tokens" not in row]
        return str(judge(rows + more, behaviour=["reworded"], **changes)["verdict"])

    # Of 60 items, five lost prove nothing, twelve do; a gain here does not count.
    assert [behaves(45, 50), behaves(38, 50), behaves(60, 0)] == ["promote", "reject", "promote"]
    assert behaves(45, 50, floors={"reworded": 0.8}) == "reject"


def test_a_benchmark_has_one_use() -> None:
    with pytest.raises(
        ValueError, match=r"a is listed in both gate\.retention and gate\.behaviour; choose one"
    ):
        GateParams(**{**PARAMS.model_dump(), "retention": {"a": 0.1}, "behaviour": ["a"]})


def test_an_item_without_a_finite_likelihood_is_an_error() -> None:
    broken = scores("candidate", 70)
    broken[3] |= {"status": "error", "score": None, "answer": "a log-likelihood is not a number"}
    decision = judge(broken + scores("base", 40))
    assert (decision["verdict"], decision["reason"]) == (
        "error",
        "scores: 1 scores are not numbers, first: candidate, facts/003: a log-likelihood is not a number; "
        "the model is broken",
    )


def test_an_item_that_is_too_long_must_be_skipped_for_both_models() -> None:
    ours, theirs = scores("candidate", 70), scores("base", 40)
    ours[99] |= {"status": "skipped", "score": None}
    assert verdict(ours, theirs) == "error"
    theirs[99] |= {"status": "skipped", "score": None}
    decision = judge(ours + theirs)
    assert (decision["verdict"], decision["gain"]["items"]) == ("promote", 99)
    # If too many are skipped, too few items are left.
    for row in (*ours[50:99], *theirs[50:99]):
        row |= {"status": "skipped", "score": None}
    assert judge(ours + theirs, min_items=51)["reason"] == (
        "gain: not judged on 50 items; facts: too few items: 50 of the 51 that gate.min_items requires; add "
        "items or raise evaluate.limit"
    )
    # None is left: the benchmark still counts, so the loss does not take its place.
    for row in (*ours[:50], *theirs[:50]):
        row |= {"status": "skipped", "score": None}
    decision = judge(ours + theirs)
    assert (decision["verdict"], decision["gain"]) == ("hold", None)
    assert decision["reason"].startswith("gain: not judged on 0 items; facts: too few items: 0 of the 50 ")


def test_a_model_that_is_not_compared_may_fail() -> None:
    rows = scores("candidate", 70) + scores("base", 40) + scores("retrieval", 100)
    for row in rows:
        if row["model"] == "retrieval":
            row |= {"status": "error", "score": None}
    assert judge(rows)["verdict"] == "promote"


def test_a_gain_within_seed_noise_is_held() -> None:
    rows = scores("candidate", 53) + scores("base", 40)
    assert judge(rows)["verdict"] == "promote"
    decision = judge(rows, seed_noise=0.05)
    assert decision["verdict"] == "hold"
    assert decision["reason"].startswith("gain: within seed noise (13.9 points): ")


def test_a_score_that_is_nan_is_an_error() -> None:
    broken = scores("candidate", 70)
    broken[3]["score"] = math.nan
    assert verdict(broken, scores("base", 40)) == "error"


def test_an_item_that_one_model_did_not_answer_is_an_error() -> None:
    assert verdict(scores("candidate", 70)[1:], scores("base", 40)) == "error"


def test_a_training_row_that_contains_an_evaluation_question_is_an_error() -> None:
    rows = scores("candidate", 70) + scores("base", 40)
    decision = judge(rows, overlaps=("elements/000001.jsonl:3 matches facts/7",))
    assert decision["verdict"] == "error"
    assert decision["reason"] == (
        "contamination: 1 training rows contain an evaluation question, first: elements/000001.jsonl:3 "
        "matches facts/7; rerun decontaminate"
    )


def test_all_faults_of_the_scores_are_reported_at_once() -> None:
    rows = scores("candidate", 30)[1:] + scores("base", 0)
    rows[0]["score"] = math.nan
    assert judge(rows, overlaps=("facts/000001.jsonl:3 matches facts/7",))["reason"] == (
        "contamination: 1 training rows contain an evaluation question, first: facts/000001.jsonl:3 matches "
        "facts/7; rerun decontaminate; scores: 1 items are scored for only one model; rerun evaluate; "
        "scores: 1 scores are not numbers, first: candidate, facts/001: x; the model is broken"
    )


def test_a_benchmark_with_too_few_items_holds_with_the_number_and_the_others_still_count() -> None:
    few = judge(scores("candidate", 49, 49) + scores("base", 0, 49))
    assert (few["verdict"], few["gain"]["mean"]) == ("hold", 1.0)
    assert few["reason"] == (
        "gain: not judged on 49 items; facts: too few items: 49 of the 50 that gate.min_items requires; add "
        "items or raise evaluate.limit"
    )
    assert [check["name"] for check in few["checks"]] == ["gain", "facts", "held-out loss"]
    # Neither do they prove a loss.
    assert judge(scores("candidate", 0, 49) + scores("base", 49, 49))["verdict"] == "hold"
    for more in ({"retention": {"small": 0.1}}, {"behaviour": ["small"]}, {}):
        rows = scores("candidate", 70) + scores("base", 40)
        for model in ("candidate", "base"):
            rows += [row for row in scores(model, 20, 49, benchmark="small") if "tokens" not in row]
        decision = judge(rows, **more)
        assert decision["verdict"] == "hold"
        assert decision["reason"].startswith(
            "small: too few items: 49 of the 50 that gate.min_items requires"
        )
    # A floor applies to any number of items.
    assert judge(scores("candidate", 9, 9) + scores("base", 0, 9), floors={"facts": 1.0})["verdict"] == "hold"
    assert (
        judge(scores("candidate", 8, 9) + scores("base", 0, 9), floors={"facts": 1.0})["verdict"] == "reject"
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("floors", {"gone": 1.0}), ("retention", {"gone": 0.0}), ("behaviour", ["gone"])]
)
def test_a_benchmark_that_is_gone_is_noted_and_ignored(setting: str, value: Any) -> None:
    decision = judge(scores("candidate", 70) + scores("base", 40), **{setting: value})
    assert decision["verdict"] == "promote"
    assert decision["checks"][-1] == {
        "name": "gone",
        "verdict": "promote",
        "message": f"ignored: gate.{setting} lists it, but no benchmark with this name was scored",
    }


def test_a_candidate_identical_to_the_champion_is_held() -> None:
    digests = {"base": None, "candidate": "c", "champion": "c"}
    decision = decide([], digests, [], PARAMS)
    assert (decision["verdict"], decision["reason"]) == (
        "hold",
        "candidate: the candidate is identical to the champion",
    )


def test_graded_scores_use_the_sign_flip_test() -> None:
    # Eight equal gains: one of the 2^8 sign flips has as large a sum; of three in four, a sum of at least 0.
    assert p_value(np.full(8, 0.3), 2000, 0) == pytest.approx(1 / 2**8)
    assert p_value(np.asarray([0.3, -0.3]), 2000, 0) == 0.75
    low, high = interval(unrelated([0.1, 0.3, 0.2, 0.4] * 10), 0.05, 2000, 0)
    assert low < 0.25 < high


def test_power_grows_with_the_items_and_falls_with_the_spread() -> None:
    found = np.asarray([1.0, -1.0, 0.0, 0.0] * 25)
    # Published: n = 34 for an effect of 0.5, two-sided alpha 0.05, power 0.8 (Cohen 1988, table 2.4.1).
    assert clusters_needed(unrelated(found / found.std(ddof=1)), 0.5, 0.025, 0.8) == 34
    assert (
        power(unrelated(found), 0.1, 0.05)
        < power(unrelated(np.tile(found, 4)), 0.1, 0.05)
        < power(unrelated(np.tile(found, 4) / 2), 0.1, 0.05)
    )
    assert power(unrelated(np.zeros(9)), 0.1, 0.05) == 1
    assert seed_band(0.0, 0.05) == 0


def test_equal_differences_that_round_differently_have_an_interval() -> None:
    # Their standard deviation is 1e-17, not 0.
    assert interval(unrelated(np.full(7, 0.1)), 0.05, 1000, 0) == (0.1, 0.1)
    found = unrelated([0.5 - 0.2, 0.7 - 0.4, 0.9 - 0.6] * 3)
    assert interval(found, 0.05, 1000, 0) == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize(
    ("effect", "items", "alpha", "expected"),
    # Noncentral t, integrated manually; the first value is in Cohen (1988), table 2.3.5.
    [
        (0.5, 34, 0.05, 0.808),
        (0.2, 100, 0.05, 0.508),
        (0.333, 60, 0.0304, 0.642),
        (0.15, 640, 0.0304, 0.948),
        (0.3, 240, 0.0003, 0.834),
        (0.4, 50, 0.0001, 0.101),
        (0.333, 3000, 0.0304, 1.0),
    ],
)
def test_power_is_that_of_the_paired_t_test(effect: float, items: int, alpha: float, expected: float) -> None:
    found = np.resize([1.0, -1.0], items)
    # The literature's tests are two-sided.
    assert power(unrelated(found / found.std(ddof=1)), effect, alpha / 2) == pytest.approx(
        expected, abs=0.005
    )


def test_power_and_items_are_defined_in_every_edge_case() -> None:
    assert power(unrelated([1.0]), 0.1, 0.03) == 0
    assert power(unrelated(np.zeros(2)), 0.1, 1e-6) == 1
    assert power(unrelated([0.0, 1.0]), 0.1, 1e-6) == pytest.approx(1e-6)
    assert clusters_needed(unrelated([1.0, -1.0]), 1e-300, 0.03, 0.8) == math.inf
    assert seed_band(0.0, 1e-17) == 0


@pytest.fixture
def checkout(in_tmp: Path) -> Path:
    """Create the inputs of the stage except the scores."""
    shutil.copy(ROOT / "params.yaml", in_tmp)
    data = in_tmp / "data"
    (data / "benchmarks").mkdir(parents=True)
    write_json(data / "evaluate" / "models.json", DIGESTS)
    write_json(data / "champion" / "champion.json", {"version": None, "best": {}})
    write_rows(data / "decontaminate" / "train.parquet", [], AUGMENTED)
    write_rows(data / "split" / "test.parquet", [], GROUPED)
    return in_tmp


def write_scores(candidate: list[dict[str, Any]], base: list[dict[str, Any]]) -> None:
    # The shipped gate parameters name these two benchmarks.
    for model, rows in (("candidate", candidate), ("base", base)):
        for name in ("countries", "elements_written"):
            rows += [row for row in scores(model, 50, 120, benchmark=name) if "tokens" not in row]
    write_rows(Path("data/evaluate/scores.parquet"), candidate + base, ALL_SCORES)


@pytest.mark.usefixtures("checkout")
def test_the_stage_writes_the_verdict_of_an_ordinary_gain() -> None:
    # 150 of 1000 items won, 50 lost: an input whose power is NaN in statsmodels at some levels.
    candidate, base = scores("candidate", 550, 1000), scores("base", 450, 1000)
    for row in candidate[:50]:
        row["score"] = 0.0
    for row in candidate[550:600]:
        row["score"] = 1.0
    write_scores(candidate, base)
    main()
    decision = read_json(Path("data/gate/gate.json"))
    assert (decision["verdict"], decision["gain"]["items"]) == ("promote", 1000)
    assert decision["gain"]["power"] == pytest.approx(0.9999, abs=2e-4)
    assert read_json(Path("data/gate/summary.json"))["verdict"] == "promote"


@pytest.mark.usefixtures("checkout")
def test_a_non_finite_figure_that_is_only_reported_does_not_change_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.gate.gain.power", lambda *_: math.nan)
    write_scores(scores("candidate", 70), scores("base", 40))
    main()
    decision = read_json(Path("data/gate/gate.json"))
    assert (decision["verdict"], decision["gain"]["power"]) == ("promote", None)


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("name", "broken", "check"),
    [
        ("gain.p_value", math.nan, "gain"),
        ("gain.seed_band", math.nan, "gain"),
        ("checks.margin_p_value", math.nan, "facts, against base"),
        ("decision.compare_losses", (math.nan, 2.0), "held-out loss"),
        ("decision.compare_losses", (2.0, math.nan), "held-out loss"),
    ],
)
def test_a_non_finite_figure_that_decides_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, check: str
) -> None:
    monkeypatch.setattr(f"tasks.gate.{name}", lambda *_, **__: broken)
    write_scores(scores("candidate", 70, parts=2), scores("base", 40, parts=2))
    main()
    decision = read_json(Path("data/gate/gate.json"))
    assert decision["verdict"] == "error"
    assert f"{check}: not a finite number: " in decision["reason"]


def test_a_slice_with_a_non_finite_p_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.gate.checks.p_value", lambda *_: math.nan)
    decision = judge(scores("candidate", 70, parts=2) + scores("base", 40, parts=2))
    assert decision["reason"].startswith("slices: not a finite number: none of 2 significantly worse")


def test_scores_that_overflow_a_sum_are_an_error() -> None:
    candidate, base = scores("candidate", 70), scores("base", 40)
    for row in candidate[:2]:
        row["score"] = 1e308
    with np.errstate(over="ignore", invalid="ignore"):
        assert verdict(candidate, base, floors={"facts": 0.5}) == "error"


def test_a_missing_score_is_an_error() -> None:
    broken = scores("candidate", 70)
    broken[3]["score"] = None
    assert verdict(broken, scores("base", 40)) == "error"


def test_heldout_examples_without_tokens_are_an_error() -> None:
    rows = scores("candidate", 70) + scores("base", 40)
    for row in rows:
        if "tokens" in row:
            row["tokens"] = 0
    assert judge(rows)["reason"].startswith("held-out loss: not a finite number: nan nats per token")


def written(items: int, gain: float) -> list[dict[str, Any]]:
    """Return scores like token F1: different for each item, higher by about `gain` for the candidate."""
    base = scores("base", 0, items)
    rows = scores("candidate", 0, items)
    for i, (ours, theirs) in enumerate(zip(rows[:items], base[:items], strict=True)):
        theirs["score"] = (i * 37 % items) / items
        # Higher by 0.5 to 1.5 times the gain.
        ours["score"] = theirs["score"] + gain * (0.5 + (i * 11 % items) / items)
    return rows + base


@pytest.mark.parametrize("n_resamples", [1000, 10_000])
@pytest.mark.parametrize("nights", [1, 90, 365, 100_000])
def test_graded_scores_can_promote_at_every_level(nights: int, n_resamples: int) -> None:
    decision = judge(written(1000, 0.38), nights=nights, n_resamples=n_resamples)
    assert (decision["verdict"], decision["gain"]["level"]) == (
        "promote",
        pytest.approx(0.05 / nights, rel=1e-5),
    )


@pytest.mark.parametrize("alpha", [0.03, 1e-3, 1e-6])
def test_sign_flip_p_values_are_accurate_at_every_level(alpha: float) -> None:
    # Equal sizes, so McNemar's exact p for 40 won and 20 lost, or 33 and 27, applies here too.
    for won, lost, expected in ((40, 20, 0.013489 / 2), (33, 27, 0.51888 / 2)):
        found = np.asarray([0.3] * won + [-0.3] * lost)
        assert p_value(found, 10_000, 0, alpha) == pytest.approx(expected, rel=0.15)
    worse = np.asarray([-0.3] * 40 + [0.3] * 20)
    assert p_value(worse, 10_000, 0, alpha) == pytest.approx(1, abs=0.02)


def test_sign_flip_p_values_have_no_lower_limit() -> None:
    found = np.full(60, 0.3)
    # One of the 2^60 sign flips has as large a sum: 8.7e-19.
    assert p_value(found, 1000, 0, alpha=1e-18) == pytest.approx(8.7e-19, rel=0.15)
    # Sampled for another significance level, p is too high, the safe side, but far below 0.001.
    assert 8.6e-19 <= p_value(found, 1000, 0, alpha=1e-4) < 1e-7


def test_the_false_positive_rate_matches_the_level() -> None:
    chance = np.random.default_rng(0)
    for alpha, expected in ((0.05, 100), (0.01, 20)):
        drawn = (chance.choice([-1.0, 1.0], 30) * chance.uniform(0.1, 1, 30) for _ in range(2000))
        crossed = sum(p_value(found, 1000, seed, alpha) <= alpha for seed, found in enumerate(drawn))
        # Three standard deviations of such a count.
        assert expected - 3 * expected**0.5 < crossed < expected + 3 * expected**0.5


def test_one_worse_slice_of_many_is_found_with_the_fewest_resamples() -> None:
    # One of 60 slices loses 0.3 on each of its 20 items: Holm's correction allows a p of 0.0008.
    base, candidate = scores("base", 0, 1200, parts=60), scores("candidate", 0, 1200, parts=60)
    for i, (ours, theirs) in enumerate(zip(candidate[:1200], base[:1200], strict=True)):
        theirs["score"], ours["score"] = 0.5, 0.8 + (i % 7) / 100
    for row in candidate[:20]:
        row["score"] -= 0.6
    decision = judge(candidate + base, n_resamples=1000)
    assert decision["reason"].startswith(
        "slices: 1 of 60 significantly worse by more than 5.0 points; facts/0 "
    )


def test_the_interval_of_a_small_alpha_uses_enough_resamples() -> None:
    found = np.random.default_rng(0).normal(0.0, 0.4, 400)
    low, high = interval(unrelated(found), 0.0002, 1000, 0)
    # Normal mean: 3.72 standard errors of 0.02 on each side; 1000 resamples reach about 3.2.
    assert (low, high) == pytest.approx((found.mean() - 0.074, found.mean() + 0.074), abs=0.004)


def test_resampling_takes_the_same_memory_for_any_number_of_items() -> None:
    found = np.random.default_rng(0).normal(0.01, 0.4, 20_000)
    for resample in (
        lambda: p_value(found, 2000, 0, alpha=1e-6),
        lambda: interval(unrelated(found[:5000]), 0.05, 2000, 0),
    ):
        tracemalloc.start()
        resample()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60 * 2**20


def test_an_alpha_that_is_too_small_for_an_interval_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.0001"):
        GateParams(**{**PARAMS.model_dump(), "alpha": 1e-5})


def of_benchmark(name: str, items: int, candidate: int, base: int, **more: Any) -> list[dict[str, Any]]:
    """Return the scores of two models on a benchmark, without losses."""
    rows = scores("candidate", candidate, items, benchmark=name) + scores("base", base, items, benchmark=name)
    return [{**row, **more} for row in rows if "tokens" not in row]


LOSSES = [row for model in ("candidate", "base") for row in scores(model, 0) if "tokens" in row]


def test_items_about_one_fact_count_as_one() -> None:
    rows = of_benchmark("facts", 120, 90, 60)
    assert judge(rows + LOSSES)["verdict"] == "promote"
    for row in rows:
        row["cluster"] = str(int(row["item"]) // 6)
    decision = judge(rows + LOSSES, min_items=20)
    # Five clusters of six items were won: p is 1 / 2^5.
    assert (decision["gain"]["clusters"], decision["gain"]["p_value"]) == (20, 0.03125)
    assert decision["verdict"] == "hold"
    assert decision["reason"].startswith("gain: not shown: +25.0 points of accuracy (95% interval ")
    assert " on 120 items about 20 subjects; p 0.0312 exceeds " in decision["reason"]
    # The number of items that are needed counts such items.
    assert decision["gain"]["items_needed"] % 6 == 0
    assert decision["gain"]["items_needed"] > 1000
    few = judge(rows + LOSSES, min_items=21)
    assert few["reason"] == (
        "gain: not judged on 120 items; facts: too few unrelated items: 20 of the 21 that gate.min_items "
        "requires; add items or raise evaluate.limit"
    )


def test_items_of_two_benchmarks_can_be_about_one_fact() -> None:
    rows = of_benchmark("facts", 60, 30, 10) + of_benchmark("reworded", 60, 30, 10)
    assert judge(rows + LOSSES)["gain"]["p_value"] == pytest.approx(0.5**40)
    for row in rows:
        row["cluster"] = row["item"]
    decision = judge(rows + LOSSES)
    assert (decision["gain"]["items"], decision["gain"]["clusters"]) == (120, 60)
    assert decision["gain"]["p_value"] == pytest.approx(0.5**20)


def test_a_large_benchmark_does_not_hide_a_loss_on_a_small_one() -> None:
    # 2,000 items gain 4 points, 100 lose 20: pooled, it would be a gain of 2.9 points, p 1e-11.
    rows = of_benchmark("large", 2000, 1080, 1000) + of_benchmark("small", 100, 60, 80)
    decision = judge(rows + LOSSES)
    assert decision["gain"]["mean"] == pytest.approx(-0.08)
    assert decision["verdict"] == "reject"
    assert " on 2,100 items of 2 benchmarks, which count the same" in decision["checks"][0]["message"]


def test_a_benchmark_without_a_changed_answer_proves_nothing_if_it_is_too_small() -> None:
    gain = of_benchmark("facts", 100, 70, 40) + LOSSES
    # 5% could have been lost: with a probability of 0.95^50 = 0.08, none of 50 items shows it.
    few = judge(gain + of_benchmark("small", 50, 30, 30), retention={"small": 0.05})
    assert few["verdict"] == "hold"
    assert few["reason"].endswith("; the loss may exceed the allowed 5.0 points (p 0.052 exceeds 0.05)")
    assert judge(gain + of_benchmark("small", 60, 30, 30), retention={"small": 0.05})["verdict"] == "promote"


# Published for 0.1: Tango (1998), Statistics in Medicine 17, soft contact lenses, 43 of 44 pairs equal. For
# 0.05, the likeliest distribution loses 5% and wins none: z = (0.05 - 1 / 44) / sqrt(0.05 * 0.95 / 44).
@pytest.mark.parametrize(("margin", "expected"), [(0.1, 0.0437), (0.05, 0.2033)])
def test_the_test_of_a_margin_is_tangos(margin: float, expected: float) -> None:
    assert margin_p_value(unrelated([-1.0] + [0.0] * 43), margin) == pytest.approx(expected, abs=5e-4)


def champion_rows(champion: int, candidate: int, best: int, items: int = 400) -> list[dict[str, Any]]:
    """Return scores on `old`, where an earlier champion was better, and on `facts`, with a clear gain."""
    rows = [row for row in scores("base", 0) if "tokens" in row]
    for model, right, known in (("candidate", candidate, 70), ("champion", champion, 40), ("best", best, 0)):
        rows += [row for row in scores(model, right, items, benchmark="old") if "tokens" not in row]
        if known:
            rows += scores(model, known)
    return rows


NIGHT = {"base": None, "candidate": "c", "champion": "d"}


def test_a_benchmark_must_not_fall_below_the_best_champion_so_far() -> None:
    def judged(champion: int, candidate: int, best: int, **changes: Any) -> dict[str, Any]:
        rows = champion_rows(champion, candidate, best)
        return decide(rows, NIGHT, (), PARAMS.model_copy(update=changes), {"old": 3, "facts": 2})

    # 340 of 400, a point less than the champion, and 5.75 points less than version 3.
    fallen = judged(champion=344, candidate=340, best=363, retention={}, margin=0.05)
    assert fallen["verdict"] == "hold"
    assert "old, against version 3, the best so far: -5.8 points of accuracy" in fallen["reason"]
    assert judged(champion=344, candidate=300, best=363)["verdict"] == "reject"
    # What has been lost already is tested at the level of one of `nights` candidates.
    held = judged(champion=344, candidate=356, best=363)
    assert held["verdict"] == "hold"
    assert held["reason"].endswith("; the loss may exceed the allowed 5.0 points (p 0.0014 exceeds 0.00014)")
    assert judged(champion=344, candidate=356, best=363, nights=12)["verdict"] == "promote"
    assert judged(champion=344, candidate=362, best=363)["verdict"] == "promote"
    # The champion is the best: nothing more is compared.
    names = [check["name"] for check in judged(champion=344, candidate=340, best=344)["checks"]]
    assert names == ["gain", "facts, against champion", "old, against champion", "slices", "held-out loss"]
    # What only guards may be too small to prove that nothing was lost.
    guard = {"behaviour": ["old"]}
    assert judged(champion=344, candidate=340, best=363, **guard)["verdict"] == "promote"
    assert judged(champion=344, candidate=310, best=363, **guard)["verdict"] == "reject"


def test_an_earlier_champion_with_too_few_common_items_is_no_measure() -> None:
    rows = [row for row in champion_rows(344, 340, 363) if row["model"] != "best" or int(row["item"]) < 49]
    assert decide(rows, NIGHT, (), PARAMS, {"old": 3})["verdict"] == "promote"


def test_the_loss_must_not_rise_above_that_of_the_best_champion_so_far() -> None:
    def judged(best: float) -> dict[str, Any]:
        rows = scores("candidate", 70, loss=2.0) + scores("champion", 40, loss=1.95) + scores("base", 0)
        rows += [row for row in scores("best", 0, loss=best) if "tokens" in row]
        return decide(rows, NIGHT, (), PARAMS.model_copy(update={"min_items": 5}), {"test": 4})

    assert judged(1.91)["verdict"] == "promote"
    assert judged(1.89)["reason"] == (
        "held-out loss, against version 4, the best so far: 2.000 nats per token, reference 1.890"
    )


def newer(decision_rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Mark the last examples of the test set as newer than the champion."""
    return [{**row, "is_new": "tokens" in row and int(row["item"]) >= 200 - count} for row in decision_rows]


def examples(model: str, loss: float, newer_loss: float, count: int) -> list[dict[str, Any]]:
    """Return the losses of 200 test examples, the last of which have another loss."""
    rows = [row for row in scores(model, 40) if "tokens" not in row]
    for i in range(200):
        per_token = (newer_loss if i >= 200 - count else loss) + 0.01 * (i % 7 - 3)
        same = {"benchmark": "test", "slice": "s", "tokens": 10, "status": "ok", "answer": None}
        rows.append({"model": model, "item": str(i), "score": per_token * 10, **same})
    return newer(rows, count)


def test_an_equal_model_that_knows_more_of_what_is_new_can_replace_the_champion() -> None:
    def judged(new_loss: float, count: int = 80, old_loss: float = 2.0, **changes: Any) -> dict[str, Any]:
        rows = examples("candidate", old_loss, new_loss, count) + examples("champion", 2.0, 2.4, count)
        changes = {"objective": "non_inferiority", **changes}
        return decide(rows, NIGHT, (), PARAMS.model_copy(update=changes))

    better = judged(2.2)
    assert better["verdict"] == "promote"
    assert better["reason"].startswith(
        "gain: better: the loss on 80 new test examples fell from 2.400 to 2.200"
    )
    assert judged(2.2, objective="superiority")["verdict"] == "hold"
    assert judged(2.4)["verdict"] == "hold"
    assert judged(2.6)["verdict"] == "reject"
    few = judged(2.2, count=49)
    assert (few["verdict"], few["reason"]) == (
        "hold",
        "gain: too few new test examples: 49 of the 50 that gate.min_items requires; add data or raise "
        "split.test_share",
    )
    # Better on what is new, worse on everything else.
    assert judged(2.2, old_loss=2.4)["reason"].startswith(
        "held-out loss: 2.320 nats per token, reference 2.16"
    )
    # The benchmarks must be shown to be as good as before.
    assert judged(2.2, margin=0.02)["reason"].startswith("facts, against champion: +0.0 points of accuracy")


def test_a_model_that_writes_answers_which_it_finds_unlikely_is_not_asked_as_it_was_trained() -> None:
    def judged(written: int, chosen: int) -> dict[str, Any]:
        rows = of_benchmark("facts", 100, 70, 40) + LOSSES
        for row in rows:
            if row["benchmark"] == "facts" and (number := int(row["item"])) >= 84:
                is_ours = row["model"] == "candidate"
                row["written"] = float(number - 84 < written) if is_ours else row["score"]
                row["score"] = float(number - 84 < chosen) if is_ours else row["score"]
        return judge(rows)

    # Of 16 questions, 3 are answered right by choice. In writing 12 of 16: p is 1 / 2^9.
    assert judged(12, 3)["verdict"] == "promote"
    blind = judged(16, 3)
    assert (blind["verdict"], blind["reason"]) == (
        "error",
        "facts, written: the candidate writes 16 of 16 right answers, but only 3 of these are its likeliest "
        "choice (p 0.00012): the choices do not follow what the model was trained on; check "
        "base.chat_template and the benchmark's task.yaml",
    )
    # A model that cannot write the answers may still know them.
    assert judged(0, 16)["verdict"] == "promote"


def test_a_saturated_benchmark_is_noted_and_changes_nothing() -> None:
    def notes(candidate: int, base: int, **changes: Any) -> list[str]:
        rows = of_benchmark("facts", 100, candidate, base) + of_benchmark("hard", 100, 70, 40)
        decision = judge(rows + LOSSES, **changes)
        assert decision["verdict"] == "promote"
        return [one["message"] for one in decision["checks"] if one["name"] == "facts, saturation"]

    assert notes(98, 96) == [
        "saturated: both models answer more than 95% right, so it can hardly show a gain; add harder items, "
        "or move it to gate.retention"
    ]
    assert notes(98, 94) == []
    assert notes(98, 96, retention={"facts": 0.1}) == []


def test_questions_that_are_known_in_their_own_wording_only_were_trained_on() -> None:
    def judged(candidate: int, reworded: int, base: int = 10, base_reworded: int = 10) -> dict[str, Any]:
        rows = of_benchmark("facts", 100, candidate, base)
        for row in of_benchmark("facts", 100, reworded, base_reworded):
            original = row["item"]
            rows.append(
                {**row, "item": f"{original}, reworded", "paraphrase_of": original, "cluster": original}
            )
        return judge(rows + LOSSES)

    # Knowledge that was learned also shows in other words.
    assert judged(60, 58)["verdict"] == "promote"
    leaked = judged(60, 12)
    assert (leaked["verdict"], leaked["reason"]) == (
        "error",
        "facts, paraphrases: the candidate gained 48.0 points more on 100 questions than on their "
        "paraphrases (p 3.6e-15): it was trained on the questions; look for them in the sources, first 012, "
        "013, 014",
    )
    # Few such questions may be chance.
    assert judged(60, 51)["verdict"] == "promote"
    assert judged(60, 50)["verdict"] == "error"
    # Both models know the wordings: nothing was gained by them.
    assert judged(60, 12, base=60, base_reworded=12)["verdict"] == "hold"
