"""A verdict without a benchmark: the losses of two models on the same test examples."""

import logging
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightshift.core.files import read_json, write_json, write_rows
from nightshift.data.schemas import ALL_SCORES, AUGMENTED, GROUPED
from tasks.gate.__main__ import main
from tasks.gate.decision import decide
from tests.helpers.checkouts import ROOT
from tests.helpers.gate import PARAMS
from tests.helpers.report import heldout, score
from tests.helpers.sft import conversation

DIGESTS = {"base": None, "candidate": "c"}


def losses(model: str, per_token: float, examples: int = 120, noise: float = 0.1) -> list[dict[str, Any]]:
    """Return losses around this one, in nats per token, on examples of 5 to 24 tokens."""
    chance = np.random.default_rng(len(model))
    return [
        heldout(model, f"t{i:03}", (per_token + noise * chance.normal()) * tokens, tokens)
        for i, tokens in enumerate(np.random.default_rng(0).integers(5, 25, examples).tolist())
    ]


def judge(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return decide(rows, DIGESTS, (), PARAMS.model_copy(update=changes))


def test_a_lower_loss_is_promoted_with_its_evidence() -> None:
    decision = judge(losses("candidate", 1.87) + losses("base", 2.31))
    assert (decision["verdict"], decision["reference"]) == ("promote", "base")
    assert decision["reason"] == (
        "gain: better: the loss on 120 test examples fell from 2.308 to 1.874 nats per token (-18.8%, 95% "
        "interval -20.0% to -17.7%)"
    )
    assert [check["name"] for check in decision["checks"]] == ["gain"]
    gain = decision["gain"]
    assert (gain["unit"], gain["benchmarks"]) == ("nats per token", ["test"])
    assert (gain["items"], gain["clusters"], gain["alpha"]) == (120, 120, 0.05)
    assert gain["mean"] == pytest.approx(decision["reference_loss"] - decision["loss"], abs=2e-6)
    assert gain["low"] < gain["mean"] < gain["high"]
    # 2% of the base's loss.
    assert gain["detectable"] == pytest.approx(0.02 * decision["reference_loss"], rel=1e-5)


def test_a_higher_loss_is_rejected_however_small_the_increase() -> None:
    # Half of what max_loss_increase would accept with benchmarks.
    decision = judge(losses("candidate", 2.36, noise=0.01) + losses("base", 2.31, noise=0.01))
    assert decision["verdict"] == "reject"
    assert decision["reason"].startswith("gain: worse: the loss on 120 test examples rose from 2.31")


def test_an_inconclusive_loss_reports_how_many_examples_are_needed() -> None:
    decision = judge(losses("candidate", 2.3, noise=0.5) + losses("base", 2.3, noise=0.5))
    assert decision["verdict"] == "hold"
    reason = decision["reason"]
    assert reason.startswith("gain: not shown: the loss on 120 test examples ")
    assert " exceeds 0.000137 (gate.alpha / gate.nights); a loss lower by 2.0% would be found " in reason
    needed = decision["gain"]["items_needed"]
    assert reason.endswith(f"%, with {needed:,.0f} test examples with probability 80%")
    assert needed > 120
    # A gain that is twice as large needs about a quarter of the examples.
    larger = judge(
        losses("candidate", 2.3, noise=0.5) + losses("base", 2.3, noise=0.5), detectable_loss_gain=0.04
    )
    smaller = judge(losses("candidate", 2.3, noise=0.5) + losses("base", 2.3, noise=0.5))
    assert larger["gain"]["items_needed"] == pytest.approx(smaller["gain"]["items_needed"] / 4, rel=0.05)


def test_the_power_depends_on_the_noise_not_on_the_gain_that_was_found() -> None:
    equal, better = (
        judge(losses("candidate", loss, noise=0.4) + losses("base", 2.3, noise=0.4))["gain"]
        for loss in (2.3, 1.3)
    )
    assert better["mean"] == pytest.approx(equal["mean"] + 1.0, abs=1e-4)
    assert better["items_needed"] == equal["items_needed"]
    assert better["power"] == pytest.approx(equal["power"], rel=1e-4)


@pytest.mark.parametrize("count", [0, 1, 2, 31, 49])
def test_fewer_test_examples_than_the_minimum_are_held_with_the_number(count: int) -> None:
    for candidate in (1.0, 3.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decision = judge(losses("candidate", candidate, count) + losses("base", 2.0, count))
        assert (decision["verdict"], decision["reason"]) == (
            "hold",
            f"gain: too few test examples: {count} of the 50 that gate.min_items requires; add data or raise "
            "split.test_share",
        )
    assert judge(losses("candidate", 1.0, 50) + losses("base", 2.0, 50))["verdict"] == "promote"


def test_an_example_without_a_loss_of_both_models_does_not_count() -> None:
    rows = losses("candidate", 1.0, 60) + losses("base", 2.0, 60)
    for row in (*rows[:11], *rows[60:71]):
        row |= {"status": "skipped", "score": None, "answer": "9 tokens exceed the model's context of 8"}
    assert judge(rows)["reason"].startswith("gain: too few test examples: 49 of the 50 ")


def test_the_loss_judges_where_every_benchmark_is_for_retention_or_behaviour() -> None:
    def known(right: int, benchmark: str) -> list[dict[str, Any]]:
        return [
            score(model, i, float(i < count), benchmark=benchmark)
            for model, count in (("candidate", right), ("base", 90))
            for i in range(100)
        ]

    better = losses("candidate", 1.9) + losses("base", 2.0)
    listed = {"retention": {"general": 0.1}, "behaviour": ["reworded"]}
    kept = judge(better + known(90, "general") + known(90, "reworded"), **listed)
    assert (kept["verdict"], kept["gain"]["unit"]) == ("promote", "nats per token")
    assert judge(better + known(60, "general"), **listed)["verdict"] == "reject"
    assert judge(better + known(60, "reworded"), **listed)["verdict"] == "reject"
    assert judge(better + known(90, "general"), **listed, floors={"general": 0.95})["verdict"] == "reject"
    # What could be lost is not proven to be kept on 20 items.
    few = [row for row in known(18, "general") if int(row["item"][1:]) < 20]
    assert judge(better + few, **listed)["reason"] == (
        "general: too few items: 20 of the 50 that gate.min_items requires; add items or raise evaluate.limit"
    )
    # With a benchmark for the gain, a lower loss alone promotes nothing.
    assert judge(better + known(90, "facts"))["gain"]["unit"] == "accuracy"
    assert judge(better + known(90, "facts"))["verdict"] == "hold"


def test_without_test_examples_the_guard_of_the_loss_holds_a_gain_on_benchmarks() -> None:
    rows = [score(model, i, value) for model, value in (("candidate", 1.0), ("base", 0.0)) for i in range(60)]
    assert judge(rows)["reason"] == (
        "held-out loss: no test example has a loss of both models; add data or raise split.test_share"
    )


def test_losses_on_two_tokenizers_are_compared_per_token_of_the_candidate() -> None:
    theirs = losses("base", 2.0, noise=0.01)
    for row in theirs:
        # The same texts and losses in half as many tokens.
        row["tokens"] = -(-row["tokens"] // 2)
    decision = judge(losses("candidate", 2.2, noise=0.01) + theirs)
    assert (decision["verdict"], round(decision["reference_loss"], 1)) == ("reject", 2.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_a_loss_that_is_not_a_number_is_an_error(broken: float | None) -> None:
    rows = losses("candidate", 1.0) + losses("base", 2.0)
    rows[3]["score"] = broken
    assert judge(rows)["reason"].startswith("scores: 1 scores are not numbers, first: candidate, test/t003")


def test_figures_that_are_not_numbers_are_errors() -> None:
    rows = losses("candidate", 1.0) + losses("base", 2.0)
    for row in rows:
        row["tokens"] = 0
    assert judge(rows)["reason"].startswith("held-out loss: not a finite number: nan nats per token")
    rows = losses("candidate", 1.0) + losses("base", 2.0)
    rows[0]["score"] = rows[1]["score"] = 1e308
    with np.errstate(over="ignore", invalid="ignore"):
        assert judge(rows)["verdict"] == "error"


def test_a_reference_that_knows_every_answer_by_heart_has_no_relative_gain() -> None:
    decision = judge(losses("candidate", 0.5, noise=0.0) + losses("base", 0.0, noise=0.0))
    assert decision["verdict"] == "reject"
    assert decision["reason"].endswith("rose from 0.000 to 0.500 nats per token")
    assert decision["gain"]["items_needed"] == math.inf


@pytest.fixture
def checkout(in_tmp: Path) -> Path:
    """Create the inputs of the stage, without benchmarks; params.yaml still names those of the demo."""
    shutil.copy(ROOT / "params.yaml", in_tmp)
    data = in_tmp / "data"
    write_json(data / "benchmarks" / "used.json", [])
    write_json(data / "evaluate" / "models.json", DIGESTS)
    write_json(data / "champion" / "champion.json", {"version": None, "best": {}})
    write_rows(data / "decontaminate" / "train.parquet", [], AUGMENTED)
    write_rows(data / "split" / "test.parquet", [], GROUPED)
    return in_tmp


@pytest.mark.usefixtures("checkout")
def test_the_stage_judges_by_the_loss_and_warns_of_benchmarks_that_are_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = losses("candidate", 1.9) + losses("base", 2.0)
    write_rows(Path("data/evaluate/scores.parquet"), rows, ALL_SCORES)
    with caplog.at_level(logging.WARNING):
        main()
    decision = read_json(Path("data/gate/gate.json"))
    assert (decision["verdict"], decision["gain"]["unit"]) == ("promote", "nats per token")
    assert [check["name"] for check in decision["checks"]] == ["gain", "countries", "elements_written"]
    assert caplog.messages[:2] == [
        "countries: ignored: gate.retention lists it, but no benchmark with this name was scored",
        "elements_written: ignored: gate.behaviour lists it, but no benchmark with this name was scored",
    ]


@pytest.mark.usefixtures("checkout")
def test_without_any_test_example_the_stage_holds_and_writes_null() -> None:
    write_rows(Path("data/evaluate/scores.parquet"), [], ALL_SCORES)
    main()
    decision = read_json(Path("data/gate/gate.json"))
    assert (decision["verdict"], decision["gain"], decision["loss"]) == ("hold", None, None)


def chat(number: int, *turns: tuple[str, str]) -> dict[str, Any]:
    """Return a conversation with these turns."""
    turn = {"tool_calls": None, "name": None}
    messages = [{"role": role, "content": content, **turn} for role, content in turns]
    return {**conversation(number), "messages": messages}


@pytest.mark.parametrize(
    ("train", "is_overlap"),
    [
        # The same prompt in another case, with another answer.
        (
            (("user", "HOW are you?"), ("assistant", "Well."), ("user", "Thanks!"), ("assistant", "Bye.")),
            True,
        ),
        # Another chat that ends with the same words.
        (
            (("user", "Where is it?"), ("assistant", "Here."), ("user", "Thanks!"), ("assistant", "Bye.")),
            False,
        ),
        ((("user", "Thanks!"), ("assistant", "Bye.")), False),
        # The same words about another document.
        (
            (
                ("system", "About gold."),
                ("user", "How are you?"),
                ("assistant", "Fine."),
                ("user", "Thanks!"),
                ("assistant", "Bye."),
            ),
            False,
        ),
        # Nothing but symbols.
        ((("user", "?!"), ("assistant", "Bye.")), False),
    ],
)
@pytest.mark.usefixtures("checkout")
def test_a_test_example_is_contaminated_by_its_whole_prompt_not_by_a_turn(
    train: Any, *, is_overlap: bool
) -> None:
    held_out = [
        chat(1, ("user", "How are you?"), ("assistant", "Fine."), ("user", "Thanks!"), ("assistant", "Bye.")),
        chat(2, ("user", "..."), ("assistant", "Bye.")),
    ]
    write_rows(Path("data/split/test.parquet"), held_out, GROUPED)
    more = {"parent_id": None, "style": None, "ordinal": None}
    write_rows(Path("data/decontaminate/train.parquet"), [{**chat(9, *train), **more}], AUGMENTED)
    rows = losses("candidate", 1.9) + losses("base", 2.0)
    write_rows(Path("data/evaluate/scores.parquet"), rows, ALL_SCORES)
    main()
    assert (read_json(Path("data/gate/gate.json"))["verdict"] == "error") == is_overlap
