"""Each check of the gate, its verdict, and that errors fail closed."""

import math
from typing import Any

import numpy as np
import pytest

from tasks.gate import GateParams
from tasks.gate.decision import decide
from tasks.gate.statistics import interval, items_needed, p_value, power, seed_band
from tests.gate import PARAMS

DIGESTS = {"base": None, "candidate": "c"}


def scores(
    model: str, right: int, items: int = 100, loss: float = 2.0, benchmark: str = "facts", parts: int = 1
) -> list[dict[str, Any]]:
    """The first items are right; slices are stretches of equal length."""
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
    return decide(rows, DIGESTS, [], overlaps, PARAMS.model_copy(update=changes))


def verdict(candidate: list[dict[str, Any]], base: list[dict[str, Any]], **changes: Any) -> str:
    return str(judge(candidate + base, **changes)["verdict"])


def test_a_clear_gain_is_promoted_with_its_evidence() -> None:
    decision = judge(scores("candidate", 70) + scores("base", 40))
    assert (decision["verdict"], decision["reference"]) == ("promote", "base")
    gain = decision["gain"]
    assert (gain["mean"], gain["items"], gain["look"]) == (0.3, 100, 1)
    assert 0.2 < gain["low"] < 0.3 < gain["high"] < 0.4
    assert decision["reason"] == (
        "gain: better: +30.0% accuracy, interval +22.0% to +39.0%, p 1.9e-09 of 0.03 at look 1"
    )
    assert [check["name"] for check in decision["checks"]] == ["gain", "facts, against base", "held-out loss"]


def test_a_small_difference_is_held_and_a_clear_loss_rejected() -> None:
    assert verdict(scores("candidate", 42), scores("base", 40)) == "hold"
    assert verdict(scores("candidate", 40), scores("base", 40)) == "hold"
    assert verdict(scores("candidate", 40), scores("base", 70)) == "reject"


def test_cannot_tell_says_how_many_items_could() -> None:
    # Five of 60 items won, two lost: a spread of 0.34, so a gain of 0.05 would rarely show.
    base = scores("base", 20, 60)
    candidate = scores("candidate", 25, 60)
    candidate[0]["score"] = candidate[1]["score"] = 0.0
    reason = judge(candidate + base, detectable_gain=0.05)["reason"]
    assert "gain: cannot tell: +5.0% accuracy" in reason
    assert "a gain of 5% would show with probability 15%, with 423 items instead of 60 with 80%" in reason


def test_a_gain_does_not_buy_a_worse_heldout_loss() -> None:
    assert verdict(scores("candidate", 70, loss=2.11), scores("base", 40)) == "reject"
    assert verdict(scores("candidate", 70, loss=2.09), scores("base", 40)) == "promote"


def test_a_floor_holds_whatever_the_gain() -> None:
    rows = scores("candidate", 70) + scores("base", 40)
    assert judge(rows, floors={"facts": 0.7})["verdict"] == "promote"
    decision = judge(rows, floors={"facts": 0.71})
    assert (decision["verdict"], decision["reason"]) == ("reject", "facts, floor: 70.0%, at least 71.0%")


def test_a_slice_that_became_worse_rejects_a_gain() -> None:
    # Of five slices with 40 items each one is lost, from 40 to 20 right answers; all others are won.
    candidate = scores("candidate", 200, 200, parts=5)
    for row in candidate[:20]:
        row["score"] = 0.0
    decision = judge(candidate + scores("base", 40, 200, parts=5))
    assert decision["verdict"] == "reject"
    assert decision["reason"] == "slices: worse: facts/0 -50.0% (p 9.5e-07); Holm's correction for 5"


def test_a_slice_that_is_worse_by_chance_does_not() -> None:
    candidate = scores("candidate", 200, 200, parts=5)
    for row in candidate[:4]:
        row["score"] = 0.0
    # Four of 40 lost alone have p = 0.06, which Holm makes 0.31.
    assert verdict(candidate, scores("base", 40, 200, parts=5)) == "promote"


def test_what_the_base_could_do_must_be_shown_to_be_kept() -> None:
    gain = scores("candidate", 70) + scores("base", 40)

    def kept(right: int) -> str:
        rows = [row for row in scores("candidate", right, 400, benchmark="general") if "tokens" not in row]
        rows += [row for row in scores("base", 200, 400, benchmark="general") if "tokens" not in row]
        return str(judge(gain + rows, retention={"general": 0.05})["verdict"])

    assert [kept(200), kept(196), kept(182), kept(150)] == ["promote", "promote", "hold", "reject"]
    # What is accepted is said for each benchmark: 50 of 400 items are lost, and 20 % may be.
    rows = [row for row in scores("candidate", 150, 400, benchmark="general") if "tokens" not in row]
    rows += [row for row in scores("base", 200, 400, benchmark="general") if "tokens" not in row]
    assert judge(gain + rows, retention={"general": 0.2})["verdict"] == "promote"


def test_what_the_base_never_answered_cannot_be_shown_to_be_kept() -> None:
    digests = {"base": None, "candidate": "c", "champion": "d"}
    rows = scores("candidate", 70) + scores("champion", 40)
    for model in ("candidate", "champion"):
        rows += [row for row in scores(model, 90, benchmark="general") if "tokens" not in row]
    params = PARAMS.model_copy(update={"retention": {"general": 0.1}})
    decision = decide(rows, digests, [], (), params)
    assert (decision["verdict"], decision["reason"]) == (
        "error",
        "scores: 100 items have a score from one model only; run evaluate again",
    )


def test_a_behaviour_test_only_rejects() -> None:
    rows = scores("candidate", 70) + scores("base", 40)

    def behaves(ours: int, theirs: int, **changes: Any) -> str:
        more = scores("candidate", ours, 60, benchmark="reworded") + scores(
            "base", theirs, 60, benchmark="reworded"
        )
        more = [row for row in more if "tokens" not in row]
        return str(judge(rows + more, behaviour=["reworded"], **changes)["verdict"])

    # Of 60 items five lost prove nothing; twelve do; and a gain there is none.
    assert [behaves(45, 50), behaves(38, 50), behaves(60, 0)] == ["promote", "reject", "promote"]
    assert behaves(45, 50, floors={"reworded": 0.8}) == "reject"
    only = [row for row in rows if row["benchmark"] == "test"]
    only += scores("candidate", 60, 60, benchmark="reworded") + scores("base", 0, 60, benchmark="reworded")
    reason = judge([row for row in only if row["item"] != "x"], behaviour=["reworded"])["reason"]
    assert reason == "scores: no benchmark has a score; see snapshot.benchmarks"


def test_a_benchmark_has_one_use() -> None:
    with pytest.raises(ValueError, match="stands under retention and under behaviour; choose one"):
        GateParams(**{**PARAMS.model_dump(), "retention": {"a": 0.1}, "behaviour": ["a"]})


def test_an_item_to_which_a_model_gave_no_number_is_an_error() -> None:
    broken = scores("candidate", 70)
    broken[3] |= {"status": "error", "score": None, "answer": "a log-likelihood is not a number"}
    decision = judge(broken + scores("base", 40))
    assert (decision["verdict"], decision["reason"]) == (
        "error",
        "scores: 1 scores are not numbers, first: candidate, facts/003: a log-likelihood is not a number; "
        "the model is broken",
    )


def test_an_item_that_is_too_long_is_left_out_for_both_or_it_is_an_error() -> None:
    ours, theirs = scores("candidate", 70), scores("base", 40)
    ours[99] |= {"status": "skipped", "score": None}
    assert verdict(ours, theirs) == "error"
    theirs[99] |= {"status": "skipped", "score": None}
    decision = judge(ours + theirs)
    assert (decision["verdict"], decision["gain"]["items"]) == ("promote", 99)
    # Too many of them, and too few are left.
    for row in (*ours[50:99], *theirs[50:99]):
        row |= {"status": "skipped", "score": None}
    assert judge(ours + theirs, min_items=51)["verdict"] == "error"


def test_a_model_that_is_not_compared_may_fail() -> None:
    rows = scores("candidate", 70) + scores("base", 40) + scores("retrieval", 100)
    for row in rows:
        if row["model"] == "retrieval":
            row |= {"status": "error", "score": None}
    assert judge(rows)["verdict"] == "promote"


def test_a_gain_within_the_band_of_seeds_is_held() -> None:
    rows = scores("candidate", 52) + scores("base", 40)
    assert judge(rows)["verdict"] == "promote"
    decision = judge(rows, seed_noise=0.05)
    assert (decision["verdict"], decision["reason"][:40]) == (
        "hold",
        "gain: no more than seeds differ (13.9%):",
    )


def test_a_score_that_is_no_number_is_an_error() -> None:
    broken = scores("candidate", 70)
    broken[3]["score"] = math.nan
    assert verdict(broken, scores("base", 40)) == "error"


def test_an_item_that_one_model_did_not_answer_is_an_error() -> None:
    assert verdict(scores("candidate", 70)[1:], scores("base", 40)) == "error"


def test_a_training_row_that_asks_an_evaluation_question_is_an_error() -> None:
    rows = scores("candidate", 70) + scores("base", 40)
    decision = judge(rows, overlaps=("elements/000001.jsonl:3 asks facts/7",))
    assert decision["verdict"] == "error"
    assert decision["reason"] == (
        "contamination: 1 training rows ask what is evaluated, first: elements/000001.jsonl:3 asks facts/7; "
        "run decontaminate again"
    )


def test_all_that_makes_scores_worthless_is_told_at_once() -> None:
    reasons = judge(scores("candidate", 30, 49) + scores("base", 0, 49), floors={"other": 0.5})["reason"]
    assert reasons == (
        "other: named in gate, but no such benchmark was scored; "
        "facts: 49 items, fewer than gate.min_items=50; add items"
    )
    assert judge([])["reason"].startswith("scores: the held-out split is empty; raise split.test_share")
    only_test = [row for row in scores("candidate", 70) + scores("base", 40) if "tokens" in row]
    assert judge(only_test)["reason"] == "scores: no benchmark has a score; see snapshot.benchmarks"


def test_the_champion_is_the_reference_and_never_its_own_successor() -> None:
    digests = {"base": None, "candidate": "c", "champion": "c"}
    decision = decide([], digests, [], [], PARAMS)
    assert (decision["verdict"], decision["reason"]) == ("hold", "candidate: the candidate is the champion")


def test_later_looks_need_a_clearer_gain() -> None:
    rows = scores("candidate", 55) + scores("base", 40)
    spent = [decide(rows, DIGESTS, ["a"] * k, [], PARAMS)["gain"]["spent"] for k in range(3)]
    assert spent == pytest.approx([0.030396, 0.007599, 0.003377], abs=1e-6)
    # Fifteen items won and none lost: p = 0.00006, which the 23rd look may no longer spend.
    looks = [str(k) for k in range(22)]
    assert decide(rows, DIGESTS, looks[:21], [], PARAMS)["verdict"] == "promote"
    assert decide(rows, DIGESTS, looks, [], PARAMS)["verdict"] == "hold"


def test_a_candidate_that_was_judged_before_keeps_its_look() -> None:
    rows = scores("candidate", 55) + scores("base", 40)
    assert decide(rows, DIGESTS, ["c", "d"], [], PARAMS)["gain"]["look"] == 1


def test_other_scores_than_right_and_wrong_are_tested_by_flipped_signs() -> None:
    # Eight equal gains: of 2^8 ways to flip signs, two are as far from zero.
    assert p_value(np.full(8, 0.3), 2000, 0) == pytest.approx(2 / 2**8)
    assert p_value(np.asarray([0.3, -0.3]), 2000, 0) == 1
    low, high = interval(np.asarray([0.1, 0.3, 0.2, 0.4] * 10), 0.05, 2000, 0)
    assert low < 0.25 < high


def test_power_grows_with_the_items_and_falls_with_the_spread() -> None:
    found = np.asarray([1.0, -1.0, 0.0, 0.0] * 25)
    # Published: n = 34 for an effect of 0.5, alpha 0.05, power 0.8 (Cohen 1988, table 2.4.1, paired).
    assert items_needed(found / found.std(ddof=1), 0.5, 0.05, 0.8) == 34
    assert (
        power(found, 0.1, 0.05)
        < power(np.tile(found, 4), 0.1, 0.05)
        < power(np.tile(found, 4) / 2, 0.1, 0.05)
    )
    assert power(np.zeros(9), 0.1, 0.05) == 1
    assert seed_band(0.0, 0.05) == 0
