"""Paraphrasing: requests, the quality gate and the counts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.errors import DataError
from nightshift.core.memo import Memo
from nightshift.replies import Failure, OnReply, Reply, Request, Result, ask
from tasks.augment import AugmentParams
from tasks.augment.__main__ import Tally, Work, choose_style, paraphrase, require_acceptance, require_rules
from tasks.augment.prompts import build_prompt, read_versions
from tasks.augment.propose import CandidateRequest, Proposal, build_request, by_rules
from tasks.augment.quality import check_paraphrase
from tasks.augment.rules import propose
from tests.helpers.checkouts import ROOT

VALUES: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["augment"]


def params(**changes: Any) -> AugmentParams:
    return AugmentParams(**{**VALUES, **changes})


def chat(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": text, "tool_calls": None, "name": None}
        for i, text in enumerate(texts)
    ]


SOURCE = chat("Who discovered Gallium?", "Gallium was discovered in 1875 by Lecoq, not by Moseley.")
GOOD = chat("Tell me who found Gallium.", "It was Lecoq, not Moseley, who found Gallium in 1875.")
VIOLATIONS = {
    "length_changed": chat("Gallium?", "1875."),
    "language_changed": chat("Кто открыл Gallium?", "Gallium открыл Lecoq в 1875 году, не Moseley."),
    "meta_text": chat(
        "Here is a paraphrase: who found Gallium?", "Lecoq, not Moseley, found Gallium in 1875."
    ),
    "number_changed": chat("Tell me who discovered Gallium.", "Lecoq, not Moseley, found it in 1857."),
    "name_changed": chat("Tell me who discovered Gallium.", "In 1875 Lecoq, not Mosely, found Gallium."),
    "negation_changed": chat("Tell me who found Gallium.", "In 1875 Gallium was found by Lecoq or Moseley."),
    "answer_changed": chat("Who found Gallium in 1875?", "It was found by Lecoq, and not by Moseley."),
    "copy_of_source": SOURCE,
    "empty_turn": chat("Who discovered Gallium?", " "),
}


@pytest.mark.parametrize(("reason", "candidate"), VIOLATIONS.items(), ids=VIOLATIONS.keys())
def test_each_violation_has_its_reason(reason: str, candidate: list[dict[str, Any]]) -> None:
    assert check_paraphrase(SOURCE, candidate, "reword", [], params())[0] == reason


def test_a_faithful_rewording_passes_once_and_its_copy_does_not() -> None:
    reason, scores = check_paraphrase(SOURCE, GOOD, "reword", [], params())
    assert reason is None
    assert scores.source_similarity is not None
    assert scores.source_similarity < 0.2
    assert check_paraphrase(SOURCE, GOOD, "reword", [GOOD], params())[0] == "copy_of_sibling"


def test_the_style_reversed_may_move_facts_from_the_answer_to_the_question() -> None:
    moved = chat("Who found Gallium in 1875?", "It was found by Lecoq, and not by Moseley.")
    assert check_paraphrase(SOURCE, moved, "reversed", [], params())[0] is None


def test_numbers_match_in_digits_and_words() -> None:
    before = chat("How far?", "It is 1,000 km, the fifty-first, on 3 May 1990.")
    after = chat("What distance?", "On May 3, 1990, the 51st, one thousand kilometres.")
    assert check_paraphrase(before, after, "reword", [], params())[0] is None


def test_a_meaning_similarity_below_the_threshold_is_rejected_with_its_score() -> None:
    reason, scores = check_paraphrase(SOURCE, GOOD, "reword", [], params(), lambda before, after: 0.5)
    assert (reason, scores.meaning_similarity) == ("meaning_changed", 0.5)
    assert check_paraphrase(SOURCE, GOOD, "reword", [], params(), lambda before, after: 0.9)[0] is None


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What is the symbol of Gold?", "The symbol of Gold is Au.",
         ["Tell me what the symbol of Gold is.", "Au is the symbol of Gold."]),
        ("In which year was Tin found?", "Tin was discovered in 1900.",
         ["Tell me in which year Tin was found.", "It was in 1900 that Tin was discovered."]),
        ("Where does the name Tin come from?", "Latin.",
         ["Tell me where the name Tin comes from.", "Latin."]),
        ("Who washed the car?", "The car was washed by Ann Lee and Bo.",
         ["Tell me who washed the car.", "Ann Lee and Bo washed the car."]),
    ],
)  # fmt: skip
def test_the_rules_reword_questions_and_answers(question: str, answer: str, expected: list[str]) -> None:
    assert list(propose(chat(question, answer), 1)) == [expected]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello there", "Hi"),
        ("What is the best way to learn, and how long does it take?", "Practice."),
        ("Who is the man that came?", "Bo."),
        ("What are you doing?", "Nothing."),
        ("Where is it?", "It was painted by Ann."),
        ("Why?", "The first of January is called New Year's Day, and it is a holiday."),
        ("Why?", "He was interested in music."),
        ("Why?", "Rome is big. The bridge was opened by Ann."),
        ("Why?", "The book was published by 1990."),
        ("Why?", "The capital of France is a city on the Seine."),
        ("Why?", "The price of milk is very high."),
    ],
)
def test_no_rule_fits_where_the_result_would_not_be_a_sentence(question: str, answer: str) -> None:
    assert list(propose(chat(question, answer), 1)) == []


def work(messages: list[dict[str, Any]]) -> Work:
    return Work({"id": "p", "group_id": "g", "source": "s", "messages": messages})


def test_a_paraphrase_keeps_its_parents_group_and_a_shortfall_is_not_padded() -> None:
    config = params(paraphrases_per_example=3)
    same, other = (
        work(chat("Hello there", "Hi")),
        work(chat("Who discovered Tin?", "Tin was discovered by Ann.")),
    )
    tally = Tally()
    paraphrase([same, other], by_rules, config, None, tally)
    assert same.accepted == []
    assert [row["ordinal"] for row in other.accepted] == list(range(1, len(other.accepted) + 1))
    assert {(row["group_id"], row["parent_id"]) for row in other.accepted} == {("g", "p")}
    assert len({row["id"] for row in other.accepted} | {"p"}) == len(other.accepted) + 1
    assert tally.wanted == 6 == tally.added + tally.shortfall.total()
    assert tally.shortfall["no_rule_fits"] == 3
    assert same.rejected == []


def test_examples_that_no_rule_fits_are_named_and_a_source_of_them_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tally = Tally()
    fits, fits_not = work(chat("Who discovered Tin?", "Ann.")), work(chat("Hello there", "Hi"))
    paraphrase([fits, fits_not], by_rules, params(), None, tally)
    require_rules(tally)
    assert caplog.messages == ["augment.backend=rules: no rule fits 1 examples of s; they have no paraphrase"]
    tally = Tally()
    paraphrase([fits_not], by_rules, params(), None, tally)
    with pytest.raises(DataError, match=r"no rule fits 1 examples of s, which are all of them; remove it"):
        require_rules(tally)


class Script:
    """A proposer that returns scripted rounds and records its requests."""

    def __init__(self, *rounds: Proposal) -> None:
        self.rounds = list(rounds)
        self.calls: list[CandidateRequest] = []

    def __call__(self, calls: Sequence[CandidateRequest]) -> list[Proposal]:
        self.calls += calls
        return [self.rounds.pop(0) for _ in calls]


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [turn["content"] for turn in messages]


def test_two_refills_list_the_rejected_candidates_and_the_shortfall_is_counted() -> None:
    wrong = texts(VIOLATIONS["number_changed"])
    script = Script(Proposal([wrong]), Proposal([], unreadable=1), Proposal([texts(GOOD)]))
    config = params(
        backend="transformers", paraphrases_per_example=2, over_generation=1, styles={"reword": 1.0}
    )
    one, tally = work(SOURCE), Tally()
    paraphrase([one], script, config, None, tally)
    assert script.rounds == []
    assert [call.count for call in script.calls] == [3, 3, 3]
    assert [call.avoid for call in script.calls] == [(), (tuple(wrong),), (tuple(wrong),)]
    assert tally.added == 1
    assert tally.rejected == {"number_changed": 1, "malformed_reply": 1}
    assert tally.shortfall == {"rejected": 1}


def test_a_failed_call_is_not_repeated_in_this_run_and_is_the_reason_of_the_shortfall() -> None:
    script = Script(Proposal([], failure="budget_spent"))
    one, tally = work(SOURCE), Tally()
    config = params(backend="openai", model="m", paraphrases_per_example=2, styles={"reword": 1.0})
    paraphrase([one], script, config, None, tally)
    assert tally.shortfall == {"budget_spent": 2}


def test_a_system_turn_is_kept_and_not_paraphrased() -> None:
    system = {"role": "system", "content": "Be brief.", "tool_calls": None, "name": None}
    script = Script(Proposal([texts(GOOD)]))
    one = work([system, *SOURCE])
    paraphrase([one], script, params(backend="transformers"), None, Tally())
    assert [turn["role"] for turn in script.calls[0].turns] == ["user", "assistant"]
    assert one.accepted[0]["messages"][0] == system


def test_one_example_gets_several_styles_in_separate_calls() -> None:
    script = Script(*(Proposal([]) for _ in range(40)))
    config = params(backend="transformers", paraphrases_per_example=8, over_generation=1)
    paraphrase([work(SOURCE)], script, config, None, Tally())
    first = [call for call in script.calls if call.ordinal == 0]
    assert len(first) == len({call.style for call in first}) > 1
    assert sum(call.count - 1 for call in first) == 8


def test_a_long_system_turn_does_not_hide_changes() -> None:
    system = {"role": "system", "content": "Answer with care. " * 60, "tool_calls": None, "name": None}
    one, tally = work([system, *SOURCE]), Tally()
    config = params(backend="transformers", styles={"reword": 1.0})
    paraphrase([one], Script(Proposal([texts(GOOD), texts(GOOD)])), config, None, tally)
    assert (tally.added, tally.surplus) == (1, 1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("He tried it twice today.", "Today he tried it thrice."),
        ("It takes a dozen eggs to bake.", "To bake it takes a score of eggs."),
        ("Der Mann hat drei Hunde und ist alt.", "Der Mann ist alt und hat vier Hunde."),
        ("It was Mr. May who called us.", "The one who called us was Mr. Will."),
        ("Half of it is gone by now.", "By now a quarter of it is gone."),
        ("Er hat nicht gewusst, was es ist.", "Er hat gewusst, was es ist."),
    ],
)
def test_changed_quantities_in_words_names_after_titles_and_other_languages_are_detected(
    before: str, after: str
) -> None:
    assert check_paraphrase(chat("So?", before), chat("And so?", after), "reword", [], params())[0] in (
        "number_changed",
        "name_changed",
        "negation_changed",
    )


def test_styles_follow_their_weights_and_are_fixed_per_example() -> None:
    config = params(backend="transformers")
    styles = [choose_style(f"example-{i}", 0, config) for i in range(2000)]
    assert [round(styles.count(s) / 2000, 1) for s in ("reword", "question_answer", "reversed")] == [
        0.6,
        0.2,
        0.1,
    ]
    assert styles == [choose_style(f"example-{i}", 0, config) for i in range(2000)]


def test_too_few_accepted_paraphrases_fail_the_stage() -> None:
    require_acceptance(Counter(a=5), Counter(a=5), 0.5)
    with pytest.raises(DataError, match="4 of 10 paraphrases passed"):
        require_acceptance(Counter(a=4), Counter(b=6), 0.5)


def test_too_few_accepted_paraphrases_of_one_source_fail_the_stage() -> None:
    require_acceptance(Counter(a=90), Counter(b=9), 0.5)
    with pytest.raises(DataError, match=r"rejected\.parquet: 1 of 11 paraphrases of b passed"):
        require_acceptance(Counter(a=90, b=1), Counter(b=10), 0.5)


@pytest.mark.parametrize(
    ("answer", "versions"),
    [
        ('{"paraphrases": [["a?", "b"], ["c?", "d"]]}', [["a?", "b"], ["c?", "d"]]),
        ('Sure!\n```json\n{"paraphrases": [["a?", "b"]]}\n```', [["a?", "b"]]),
        ('Well {"paraphrases": [["a?", "b"]]} and so on', [["a?", "b"]]),
        ("User: a?\nAssistant: b\nand more", [["a?", "b\nand more"]]),
        ('{"paraphrases": [["a?"], "b", ["c?", 1], ["d?", "e"]]}', [None, None, None, ["d?", "e"]]),
        ("Assistant: b\nUser: a?", [None]),
        ('{"paraphrases": [["a?", "b"]', [None]),
        ('{"other": 1}', [None]),
        ("", [None]),
    ],
)
def test_replies_are_parsed_leniently_but_never_guessed(
    answer: str, versions: list[list[str] | None]
) -> None:
    assert read_versions(answer, ["user", "assistant"]) == versions


def test_the_prompt_contains_the_conversation_the_style_and_the_rejected_candidates() -> None:
    (message,) = build_prompt(SOURCE, "reversed", 3, [["x?", "y"]])
    for part in ("Turn the relation round", "3 versions", '["x?", "y"]', "User: Who discovered Gallium?"):
        assert part in message["content"]


class Counting:
    """A test backend that numbers its answers, or always fails."""

    def __init__(self, fail: bool = False) -> None:  # noqa: FBT001, FBT002
        self.fail = fail
        self.calls = 0

    def __call__(self, requests: Sequence[Request], on_reply: OnReply) -> list[Result]:
        results: list[Result] = []
        for number in range(len(requests)):
            self.calls += 1
            if self.fail:
                results.append(Failure("timeout"))
                continue
            reply = Reply((f"answer {self.calls}",), 7)
            on_reply(number, reply)
            results.append(reply)
        return results


def request(text: str, answers: int = 1, ordinal: int = 0) -> Request:
    return Request([{"role": "user", "content": text}], answers, ordinal)


def test_a_reply_is_cached_and_a_failure_is_not(tmp_path: Path) -> None:
    with Memo("paraphrases", {}, tmp_path) as memo:
        broken, backend = Counting(fail=True), Counting()
        assert ask([request("a")], "m", broken, memo) == [Failure("timeout")]
        first = ask([request("a"), request("b"), request("a")], "m", backend, memo)
        assert first == [Reply(("answer 1",), 7), Reply(("answer 2",), 7), Reply(("answer 1",), 7)]
        assert ask([request("b")], "m", backend, memo) == [Reply(("answer 2",), 7)]
        assert backend.calls == 2
        ask([request("b")], "another model", backend, memo)
        ask([request("b", answers=2)], "m", backend, memo)
        ask([request("b", ordinal=1)], "m", backend, memo)
        assert backend.calls == 5


def test_a_local_model_returns_several_answers_and_an_endpoint_several_versions_in_one() -> None:
    call = CandidateRequest(SOURCE, "reword", 3, (), 0)
    assert build_request(call, local=True).answers == 3
    assert "3 versions" in build_request(call, local=False).prompt[0]["content"]
