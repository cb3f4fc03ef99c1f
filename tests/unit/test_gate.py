"""Each verdict, and that errors fail closed."""

import math
from typing import Any

import pytest

from tasks.gate import GateParams, decide

PARAMS = GateParams(confidence=0.95, n_resamples=2000, max_loss_increase=0.05, min_items=50, seed=0)
DIGESTS = {"base": None, "candidate": "c"}


def scores(model: str, right: int, items: int = 100, loss: float = 2.0) -> list[dict[str, Any]]:
    rows = [
        {"model": model, "benchmark": "facts", "item": str(i), "score": float(i < right)}
        for i in range(items)
    ]
    tests = [
        {"model": model, "benchmark": "test", "item": str(i), "score": loss * 10, "tokens": 10}
        for i in range(5)
    ]
    return rows + tests


def verdict(candidate: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    return str(decide(candidate + base, DIGESTS, [], PARAMS)["verdict"])


def test_a_clear_gain_is_promoted() -> None:
    decision = decide(scores("candidate", 70) + scores("base", 40), DIGESTS, [], PARAMS)
    assert decision["verdict"] == "promote"
    assert decision["reference"] == "base"
    assert decision["gain"]["mean"] == 0.3
    assert 0.2 < decision["gain"]["low"] < 0.3 < decision["gain"]["high"] < 0.4


def test_a_small_difference_is_held_and_a_clear_loss_rejected() -> None:
    assert verdict(scores("candidate", 42), scores("base", 40)) == "hold"
    assert verdict(scores("candidate", 40), scores("base", 40)) == "hold"
    assert verdict(scores("candidate", 40), scores("base", 70)) == "reject"


def test_a_gain_does_not_buy_a_worse_heldout_loss() -> None:
    assert verdict(scores("candidate", 70, loss=2.11), scores("base", 40)) == "reject"
    assert verdict(scores("candidate", 70, loss=2.09), scores("base", 40)) == "promote"


def test_a_score_that_is_no_number_is_an_error() -> None:
    broken = scores("candidate", 70)
    broken[3]["score"] = math.nan
    assert verdict(broken, scores("base", 40)) == "error"


def test_an_item_that_one_model_did_not_answer_is_an_error() -> None:
    assert verdict(scores("candidate", 70)[1:], scores("base", 40)) == "error"


def test_too_few_items_or_no_heldout_split_is_an_error() -> None:
    assert verdict(scores("candidate", 30, 49), scores("base", 0, 49)) == "error"
    assert verdict([], []) == "error"
    no_test = [row for row in scores("candidate", 70) if row["benchmark"] != "test"]
    no_test += [row for row in scores("base", 40) if row["benchmark"] != "test"]
    assert decide(no_test, DIGESTS, [], PARAMS)["reason"].startswith("the held-out split is empty")


def test_the_champion_is_the_reference_and_never_its_own_successor() -> None:
    digests = {"base": None, "candidate": "c", "champion": "c"}
    decision = decide([], digests, [], PARAMS)
    assert (decision["verdict"], decision["reason"]) == ("hold", "the candidate is the champion")


def test_later_looks_need_a_clearer_gain() -> None:
    rows = scores("candidate", 55) + scores("base", 40)
    alphas = [decide(rows, DIGESTS, ["a"] * k, PARAMS)["decisive"]["alpha"] for k in range(3)]
    assert alphas == pytest.approx([0.030396, 0.007599, 0.003377], abs=1e-6)
    assert sum(0.05 * 6 / (math.pi * k) ** 2 for k in range(1, 10_000)) < 0.05


def test_a_candidate_that_was_judged_before_keeps_its_look() -> None:
    rows = scores("candidate", 55) + scores("base", 40)
    assert decide(rows, DIGESTS, ["c", "d"], PARAMS)["decisive"]["look"] == 1
