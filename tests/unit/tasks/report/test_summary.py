"""The first lines of the report, sentence by sentence, from scores and the gate's own decision."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tasks.gate.decision import decide
from tasks.report.advice import Outcome, advise, describe_outcome
from tasks.report.compare import compare
from tasks.report.evidence import Evidence
from tasks.report.summary import describe_statistics, headline, summarize
from tests.helpers.gate import PARAMS
from tests.helpers.report import heldout, score

# Benchmark -> slice -> right answers of 60 questions, the first ones; a fraction is a graded answer.
Right = Mapping[str, Mapping[str, float]]
QUESTIONS = 60
CHAMPION: Right = {"elements": {"mass": 30, "symbol": 30}, "countries": {"capital": 50}}
BETTER: Right = {"elements": {"mass": 50, "symbol": 42}, "countries": {"capital": 50}}
# Six answers won, four lost.
SIMILAR: Right = {"elements": {"mass": 36, "symbol": 26}, "countries": {"capital": 50}}
PROMOTED = Outcome(version=2, champion=1, is_champion=True, waits=None)
REGISTERED = Outcome(version=2, champion=1, is_champion=False, waits=None)


def answers(model: str, right: Right) -> list[dict[str, Any]]:
    """Return the scores of a model on benchmarks."""
    return [
        score(model, QUESTIONS * k + i, min(1.0, max(0.0, count - i)), benchmark=name, slice=slice_)
        for name, slices in right.items()
        for k, (slice_, count) in enumerate(slices.items())
        for i in range(QUESTIONS)
    ]


def losses(model: str, loss: float) -> list[dict[str, Any]]:
    """Return the losses of a model, in nats per token, on nine held-out examples."""
    return [heldout(model, f"t{i}", 10 * loss, 10) for i in range(9)]


def judge(
    candidate: Right,
    reference: Right = CHAMPION,
    *,
    model: str = "champion",
    more: Sequence[dict[str, Any]] = (),
    loss: float = 1.9,
    available: Mapping[str, int] | None = None,
    **changes: Any,
) -> Evidence:
    """Let the gate judge a candidate; the base answers like the champion, with a loss of 2."""
    params = PARAMS.model_copy(update={"retention": {"countries": 0.1}, **changes})
    digests = {"base": None, "candidate": "c", model: None if model == "base" else "d"}
    rows = [*answers("candidate", candidate), *losses("candidate", loss), *more]
    for other in {"base", model}:
        rows += [*answers(other, reference), *losses(other, 2.0)]
    gate = decide(rows, digests, (), params)
    return Evidence(gate, compare(rows, gate["reference"], params), available or {}, params)


def test_a_promotion_says_what_got_better_and_how_sure_that_is() -> None:
    evidence = judge(BETTER)
    assert headline(evidence) == "Ship it: the new model is better"
    # Without a retrieval baseline there is no sentence on it.
    assert summarize(evidence, PROMOTED) == [
        "The new model is better than the champion on elements (76.7%, +26.7 points) and the held-out "
        "examples "
        "(loss 1.900, -0.100 nats per token).",
        "It is worse on no benchmark. No slice is worse.",
        "The gain on elements is proven: with 95% confidence, the change is between +19.2 and +35.0 points.",
        "Version 2 is now the champion, replacing version 1. `nightshift rollback --reason TEXT` undoes "
        "this; "
        "`nightshift history` lists all promotions.",
    ]


def test_before_the_first_champion_the_base_is_the_reference() -> None:
    found = summarize(judge(BETTER, model="base"), Outcome(1, None, is_champion=True, waits=None))
    assert found[0].startswith("The new model is better than the base on elements (76.7%, +26.7 points) and ")
    assert found[-1] == "Version 1 is now the champion. `nightshift history` lists all promotions."


@pytest.mark.parametrize(
    ("right", "relation"),
    [
        (55, "91.7% on elements, more than"),
        (46, "76.7% on elements, as much as"),
        (9, "15.0% on elements, less than"),
    ],
)
def test_retrieval_is_compared_with_the_new_model(right: int, relation: str) -> None:
    more = answers("retrieval", {"elements": {"mass": right, "symbol": right}})
    assert summarize(judge(BETTER, more=more), PROMOTED)[2] == (
        f"A search over the training data, without training, reaches {relation} the new model's 76.7%."
    )


def test_a_gain_that_may_be_chance_is_held_and_the_limit_on_the_items_is_named() -> None:
    evidence = judge(SIMILAR, available={"elements": 641, "countries": 60})
    assert headline(evidence) == "Do not ship it yet: the result is inconclusive"
    assert summarize(evidence, REGISTERED) == [
        "The new model is better than the champion on elements (51.7%, +1.7 points, not significant) and the "
        "held-out examples (loss 1.900, -0.100 nats per token).",
        "It is worse on no benchmark. Of 2 slices, 1 got worse: elements/symbol (-6.7 points on 60 items, "
        "not "
        "significant).",
        "A gain on elements is not proven: +1.7 points on 120 items may be chance; 120 of 641 items were "
        "asked "
        "(evaluate.limit).",
        "Version 2 is registered, but not promoted; version 1 remains the champion. To ask more items (about "
        "175 would show a gain of 10.0 points), raise evaluate.limit, then type `make run`.",
    ]


def test_one_of_many_candidates_needs_a_clearer_gain() -> None:
    # Six answers won, none lost: p = 0.016.
    evidence = judge({**CHAMPION, "elements": {"mass": 36, "symbol": 30}})
    assert evidence.gate["verdict"] == "hold"
    assert summarize(evidence, REGISTERED)[-2] == (
        "A gain on elements is not proven: +5.0 points on 120 items are not enough for one of 365 "
        "candidates, as more tries make luck likelier."
    )


def test_a_gain_within_the_noise_of_the_seed_is_held() -> None:
    assert summarize(judge(BETTER, seed_noise=0.15), REGISTERED)[-2:] == [
        "A gain on elements is not proven: another training seed alone may change the accuracy by 41.6 "
        "points.",
        "Version 2 is registered, but not promoted; version 1 remains the champion. Change the data or "
        "params.yaml, then type `make run`.",
    ]


def test_a_retention_benchmark_that_may_have_lost_too_much_holds_a_proven_gain() -> None:
    # Three of 60 answers lost; the interval reaches below the allowed 10 points.
    candidate = {**BETTER, "countries": {"capital": 47}}
    evidence = judge(candidate, available={"elements": 120, "countries": 300})
    assert headline(evidence) == "Do not ship it yet: the result is inconclusive"
    assert summarize(evidence, REGISTERED)[1:] == [
        "It is worse than the base on countries (78.3%, -5.0 points, not significant). No slice is worse.",
        "The gain on elements is proven: with 95% confidence, the change is between +19.2 and +35.0 points. "
        "The "
        "gate holds the new model because more than the allowed 10.0 points may have been lost on countries, "
        "where 60 of 300 items were asked (evaluate.limit).",
        "Version 2 is registered, but not promoted; version 1 remains the champion. To ask more items, raise "
        "evaluate.limit, then type `make run`.",
    ]
    assert summarize(judge(candidate), REGISTERED)[-1].endswith(
        "remains the champion. Add items to countries, then type `make run`."
    )


def test_a_rejection_names_every_reason() -> None:
    worse: Right = {"elements": {"mass": 20, "symbol": 20}, "countries": {"capital": 30}}
    evidence = judge(worse)
    assert headline(evidence) == "Do not ship it: the new model is not good enough"
    assert summarize(evidence, REGISTERED) == [
        "The new model is better than the champion on the held-out examples (loss 1.900, -0.100 nats per "
        "token).",
        "It is worse than the champion on elements (33.3%, -16.7 points), and than the base on countries "
        "(50.0%, "
        "-33.3 points). Of 2 slices, 2 got worse: elements/mass (-16.7 points on 60 items, significant) and "
        "elements/symbol (-16.7 points on 60 items, significant).",
        "The loss on elements is proven: with 95% confidence, the change is between -24.2 and -10.0 points. "
        "The "
        "gate also rejects the new model because more than the allowed 5.0 points were lost on elements, "
        "more than "
        "the allowed 10.0 points were lost on countries and a slice is significantly worse by more than 5.0 "
        "points.",
        "Version 2 is registered, but not promoted; version 1 remains the champion. The report shows what "
        "got "
        "worse; change the data or params.yaml, then type `make run`.",
    ]


def test_a_floor_and_a_higher_loss_are_reasons_in_plain_words() -> None:
    found = summarize(judge(BETTER, loss=2.2, floors={"elements": 0.8}), REGISTERED)
    assert found[1].startswith(
        "It is worse than the champion on the held-out examples (loss 2.200, +0.200 nats per token)."
    )
    assert found[2].endswith(
        "The gate rejects the new model because the accuracy on elements is below its minimum of 80.0% and "
        "the "
        "loss on held-out examples rose by more than 5%."
    )


def test_slices_that_got_worse_are_named_the_significant_one_first() -> None:
    champion: Right = {
        "elements": {"mass": 30, "period": 3, "radius": 50, "symbol": 30},
        "countries": {"capital": 50, "river": 11},
    }
    candidate: Right = {
        "elements": {"mass": 60, "period": 0, "radius": 38, "symbol": 58},
        "countries": {"capital": 50, "river": 10},
    }
    evidence = judge(candidate, champion)
    assert evidence.gate["verdict"] == "reject"
    assert summarize(evidence, REGISTERED)[1] == (
        "It is worse than the base on countries (50.0%, -0.8 points, not significant). Of 6 slices, 3 got "
        "worse: "
        "elements/radius (-20.0 points on 60 items, significant), elements/period (-5.0 points on 60 items, "
        "not "
        "significant) and countries/river (-1.7 points on 60 items, significance not tested)."
    )


def test_of_many_slices_three_are_named_and_the_others_counted() -> None:
    champion = {**CHAMPION, "elements": {f"{i} {'x' * 99}": 30.0 for i in range(6)}}
    candidate = {**CHAMPION, "elements": {f"{i} {'x' * 99}": 30.0 - i % 5 for i in range(6)}}
    text = summarize(judge(candidate, champion), REGISTERED)[1]
    assert "Of 6 slices, 4 got worse: elements/4 xxx" in text
    assert text.count("points on 60 items") == 3
    assert text.endswith(" and 1 more.")
    assert "x … (50 more characters) (-6.7 points on 60 items, not significant)" in text


def test_graded_answers_are_described_like_right_and_wrong_ones() -> None:
    candidate: Right = {"elements": {"mass": 45.25, "symbol": 29.5}, "countries": {"capital": 49.75}}
    assert summarize(judge(candidate), PROMOTED)[:3] == [
        "The new model is better than the champion on elements (62.3%, +12.3 points) and the held-out "
        "examples "
        "(loss 1.900, -0.100 nats per token).",
        "It is worse than the base on countries (82.9%, -0.4 points, not significant). Of 2 slices, 1 got "
        "worse: "
        "elements/symbol (-0.8 points on 60 items, not significant).",
        "The gain on elements is proven: with 95% confidence, the change is between +7.1 and +19.2 points.",
    ]


def test_a_candidate_without_any_difference_is_neither_better_nor_worse() -> None:
    found = summarize(judge(CHAMPION, loss=2.0), REGISTERED)
    assert found[:3] == [
        "The new model is better on no benchmark.",
        "It is worse on no benchmark. No slice is worse.",
        "A gain on elements is not proven: the change is +0.0 points on 120 items.",
    ]


def test_scores_that_cannot_be_used_are_not_described() -> None:
    rows = answers("candidate", {"elements": {"mass": 1}})[:-1]
    gate = decide([*rows, *answers("base", {"elements": {"mass": 1}})], {"candidate": "c"}, (), PARAMS)
    evidence = Evidence(gate, [], {}, PARAMS)
    assert headline(evidence) == "Do not ship it: the scores cannot be used"
    assert summarize(evidence, Outcome(None, 1, is_champion=False, waits=None)) == [
        "The gate could not decide: scores: 1 items are scored for only one model; rerun evaluate.",
        "The new model is not registered; version 1 remains the champion. Correct the cause, then type `make "
        "run`.",
    ]
    assert describe_statistics(evidence) == ""


def test_a_candidate_identical_to_the_champion_is_nothing_new() -> None:
    gate = decide([], {"base": None, "candidate": "c", "champion": "c"}, (), PARAMS)
    evidence = Evidence(gate, [], {}, PARAMS)
    assert headline(evidence) == "Nothing new: the champion is kept"
    assert summarize(evidence, Outcome(1, 1, is_champion=True, waits=None)) == [
        "The new model is identical to the champion.",
        "Version 1 remains the champion. Add data or change params.yaml, then type `make run`.",
    ]


@pytest.mark.parametrize(
    ("outcome", "sentences"),
    [
        (
            Outcome(2, 1, is_champion=False, waits="registry.approval is manual"),
            "Version 2 waits for approval (registry.approval is manual); version 1 remains the champion. To "
            "ship "
            "it, type `nightshift promote 2 --reason TEXT`.",
        ),
        (
            Outcome(1, None, is_champion=False, waits="registry.approval is manual"),
            "Version 1 waits for approval (registry.approval is manual); there is no champion yet. To ship "
            "it, "
            "type `nightshift promote 1 --reason TEXT`.",
        ),
        (
            Outcome(None, None, is_champion=False, waits=None),
            "The new model is not registered; there is no champion yet. The run did not finish: read its "
            "log, "
            "then type `make run`.",
        ),
        (
            REGISTERED,
            "Version 2 is registered, but not promoted; version 1 remains the champion. The run did not "
            "finish: "
            "read its log, then type `make run`.",
        ),
    ],
)
def test_the_next_step_depends_on_the_state_in_the_registry(outcome: Outcome, sentences: str) -> None:
    assert f"{describe_outcome(outcome)} {advise(judge(BETTER), outcome)}" == sentences


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"available": {"elements": 641}},
            "To ask more items (about 680 would show a gain of 5.0 points), raise evaluate.limit, then type "
            "`make run`.",
        ),
        ({}, "Add items to elements (about 680 would show a gain of 5.0 points), then type `make run`."),
        ({"detectable_gain": 0.2, "margin": 0.01}, "Add items to elements, then type `make run`."),
    ],
)
def test_a_hold_says_how_many_items_would_show_a_gain(changes: dict[str, Any], advice: str) -> None:
    assert advise(judge(SIMILAR, **{"detectable_gain": 0.05, **changes}), REGISTERED) == advice


def test_the_statistics_of_the_gain_are_a_footnote() -> None:
    evidence = judge(SIMILAR)
    text = (
        "Gain: p = 0.38 in a one-sided paired test. The limit is 0.00014 = gate.alpha / gate.nights: among "
        "365 candidates that are no better, one is promoted with a probability of at most 0.05."
    )
    power = " 120 items show a gain of 10.0 points with a probability of 52%."
    assert describe_statistics(evidence) == text + power
    gain = {**evidence.gate["gain"], "power": None}
    assert describe_statistics(Evidence({**evidence.gate, "gain": gain}, [], {}, PARAMS)) == text


def test_a_figure_that_is_not_finite_is_left_out() -> None:
    evidence = judge(BETTER)
    gain = {**evidence.gate["gain"], "low": None, "high": None, "items_needed": None}
    unknown = Evidence({**evidence.gate, "gain": gain}, evidence.benchmarks, {}, evidence.params)
    assert summarize(unknown, PROMOTED)[2] == (
        "The gain on elements is proven: its confidence interval could not be computed."
    )


def test_a_reason_without_plain_words_is_the_message_of_the_check() -> None:
    evidence = judge(BETTER)
    check = {"name": "unread", "verdict": "hold", "message": "1 item was skipped"}
    gate = {**evidence.gate, "verdict": "hold", "checks": [*evidence.gate["checks"], check]}
    held = Evidence(gate, evidence.benchmarks, {}, evidence.params)
    assert summarize(held, REGISTERED)[2].endswith("The gate holds the new model because 1 item was skipped.")


NO_BENCHMARK: Right = {}
FIRST = Outcome(version=1, champion=None, is_champion=True, waits=None)
HELD = Outcome(version=1, champion=None, is_champion=False, waits=None)


def judge_loss(
    loss: float, examples: int = 120, noise: float = 0.0, known: Right = NO_BENCHMARK, **changes: Any
) -> Evidence:
    """Let the gate judge a candidate by its loss, which varies by `noise`; the base has a loss of 2."""
    rows = [*answers("candidate", known), *(answers("base", {"countries": {"capital": 50}}) if known else [])]
    for i in range(examples):
        wobble = noise if i % 2 else -noise
        rows += [heldout("candidate", f"t{i}", 10 * (loss + wobble), 10), heldout("base", f"t{i}", 20.0, 10)]
    params = PARAMS.model_copy(update={"retention": {"countries": 0.1}, **changes})
    gate = decide(rows, {"base": None, "candidate": "c"}, (), params)
    return Evidence(gate, compare(rows, "base", params), {}, params)


def test_without_a_benchmark_a_lower_loss_is_described_and_shipped() -> None:
    evidence = judge_loss(1.5, noise=0.1)
    assert headline(evidence) == "Ship it: the new model is better"
    assert summarize(evidence, FIRST) == [
        "Against the base, the loss on 120 test examples fell from 2.000 to 1.500 nats per token (-25.0%, "
        "95% interval -25.9% to -24.1%).",
        "The lower loss is proven.",
        "Version 1 is now the champion. `nightshift history` lists all promotions.",
    ]
    assert describe_statistics(evidence).endswith(
        " 120 test examples show a loss lower by 2.0% with a probability of 73%."
    )


def test_without_a_benchmark_a_loss_that_may_be_chance_is_held() -> None:
    evidence = judge_loss(1.99, noise=0.4)
    assert headline(evidence) == "Do not ship it yet: the result is inconclusive"
    assert summarize(evidence, HELD)[1:] == [
        "A lower loss is not proven: -0.5% on 120 test examples may be chance.",
        "Version 1 is registered, but not promoted; there is no champion yet. For more test examples (about "
        "2,031 would show a loss lower by 2.0%), add data or raise split.test_share, then type `make run`.",
    ]
    assert summarize(judge_loss(2.01, noise=0.4), HELD)[1] == (
        "A lower loss is not proven: the change is +0.5% on 120 test examples."
    )
    assert summarize(judge_loss(1.999, noise=0.02), HELD)[-1].endswith(
        " These test examples would have shown a loss lower by 2.0%. Change the data or params.yaml, then "
        "type `make run`."
    )


def test_without_a_benchmark_a_higher_loss_is_rejected() -> None:
    evidence = judge_loss(2.1, noise=0.1)
    assert headline(evidence) == "Do not ship it: the new model is not good enough"
    found = summarize(evidence, HELD)
    assert found[0].startswith(
        "Against the base, the loss on 120 test examples rose from 2.000 to 2.100 nats per token (+5.0%, 95% "
    )
    assert found[1] == "The higher loss is proven."


@pytest.mark.parametrize("count", [31, 0])
def test_too_few_test_examples_are_counted(count: int) -> None:
    found = summarize(judge_loss(1.5, count), HELD)
    assert found[-2:] == [
        f"There are too few test examples for a verdict: {count} of 50 (gate.min_items).",
        "Version 1 is registered, but not promoted; there is no champion yet. For more test examples, add "
        "data or raise split.test_share, then type `make run`.",
    ]
    # Without any, there is no loss to describe.
    assert len(found) == (3 if count else 2)


def test_a_lower_loss_does_not_compensate_what_was_forgotten() -> None:
    found = summarize(judge_loss(1.5, noise=0.1, known={"countries": {"capital": 20}}), HELD)
    assert found[1:4] == [
        "The new model is better on no benchmark.",
        "It is worse than the base on countries (33.3%, -50.0 points).",
        "The lower loss is proven. The gate rejects the new model because more than the allowed 10.0 points "
        "were lost on countries.",
    ]


def test_a_benchmark_with_too_few_items_holds_and_is_named() -> None:
    assert summarize(judge(BETTER, min_items=121), REGISTERED)[2:] == [
        "There are too few items on elements for a verdict: 120 of 121 (gate.min_items). The gate also holds "
        "the new model because countries has fewer than 121 items (gate.min_items) and elements has fewer "
        "than 121 items (gate.min_items).",
        "Version 2 is registered, but not promoted; version 1 remains the champion. Add items to countries "
        "and elements, then type `make run`.",
    ]


def test_answers_to_test_examples_are_a_benchmark_with_its_own_remedy() -> None:
    candidate = {"test_answers": SIMILAR["elements"], "countries": CHAMPION["countries"]}
    reference = {"test_answers": CHAMPION["elements"], "countries": CHAMPION["countries"]}
    evidence = judge(candidate, reference, detectable_gain=0.05)
    assert advise(evidence, REGISTERED) == (
        "For more test examples (about 680 would show a gain of 5.0 points), add data or raise "
        "split.test_share, then type `make run`."
    )


def test_a_gain_on_benchmarks_without_any_test_example_is_held() -> None:
    params = judge(BETTER).params
    rows = [*answers("candidate", BETTER), *answers("base", CHAMPION)]
    gate = decide(rows, {"base": None, "candidate": "c"}, (), params)
    found = summarize(Evidence(gate, compare(rows, "base", params), {}, params), HELD)
    assert found[2].endswith(" The gate holds the new model because no test example has a loss to compare.")
    assert found[-1].endswith(
        " For more test examples, add data or raise split.test_share, then type `make run`."
    )
