"""Evaluation questions must not be in the training set."""

from pathlib import Path
from typing import Any

import yaml

from nightshift.core.files import jsonl, write_rows, write_text
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.data.schemas import GROUPED
from tasks.decontaminate import DecontaminateParams, build_index, evaluation_questions, find_hit

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SHORT = "In which year was gallium found?"
PARAMS = DecontaminateParams(ngram_size=13, min_question_words=5, max_containment=0.8, max_drop_rate=1.0)
ITEMS = [("facts", "q1", "Who found Tin?"), ("facts", "q2", LONG), ("facts", "q3", SHORT)]
QUESTIONS = build_index(ITEMS, PARAMS)


def row(question: str, answer: str = "x", role: str = "user") -> dict[str, Any]:
    messages = [{"role": role, "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "r", "origin": "chats/000001.jsonl:7", "messages": messages}


def hit(question: str, answer: str = "x", role: str = "user") -> tuple[str, str] | None:
    found = find_hit(row(question, answer, role), QUESTIONS, PARAMS)
    return (found["item"], found["reason"]) if found else None


def test_an_equal_question_is_a_hit_regardless_of_case_and_punctuation() -> None:
    assert find_hit(row("who found TIN"), QUESTIONS, PARAMS) == {
        "id": "r",
        "origin": "chats/000001.jsonl:7",
        "benchmark": "facts",
        "item": "q1",
        "reason": "same_question",
        "match": "who found tin",
        "containment": 1.0,
    }


def test_a_question_inside_a_longer_text_is_a_hit_by_ngram() -> None:
    assert hit(f"Please tell me: {LONG}, now") == ("q2", "shared_ngram")
    # 13 of its 15 words in sequence are enough, 12 are not (10 of 13 shingles are contained).
    assert hit(" ".join(["so", *LONG.split()[:13], "end"])) == ("q2", "shared_ngram")
    assert hit(" ".join(["so", *LONG.split()[:12], "end"])) is None


def test_a_question_shorter_than_the_ngram_is_a_hit_by_all_its_words() -> None:
    assert hit("Tell me, in which year was gallium found? Thanks!") == ("q3", "shared_ngram")
    assert hit("In which year was thallium found?") is None


def test_a_question_scattered_over_a_text_is_a_hit_by_containment() -> None:
    # 11 of its 13 shingles are contained, but never 13 words in sequence.
    words = LONG.split()
    assert hit(" ".join([*words[:8], "and", "then", *words[6:]])) == ("q2", "contained_question")


def test_a_plain_text_is_searched_like_a_question() -> None:
    assert hit(f"A book says: {LONG}.", role="text") == ("q2", "shared_ngram")


def test_an_equal_answer_is_not_a_hit() -> None:
    assert hit("What is this?", "Who found Tin?") is None
    assert hit("What is this?", LONG) is None


def test_a_very_short_question_inside_a_longer_one_is_not_a_hit() -> None:
    assert hit("Who found Tin first of all?") is None


def test_every_wording_of_every_kind_of_benchmark_is_indexed(tmp_path: Path) -> None:
    def put(name: str, task: Any, item: dict[str, Any]) -> None:
        write_text(tmp_path / "b" / name / "task.yaml", yaml.safe_dump(task))
        write_text(tmp_path / "b" / name / "items.jsonl", jsonl([{"id": "1", **item}]))

    choices = {"choices": ["x", "y"], "answer": 0}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Turn?"}]
    put("changed", {"kind": "direction"}, {"question": "Q?", "changed": "C?", "expect": "lower", **choices})
    put("facts", CHOICE_TASK, {"question": "F?", **choices})
    put(
        "reworded",
        {"kind": "invariance"},
        {"question": "R?", "variants": ["V?", "W?"], "choices": ["x", "y"]},
    )
    put(
        "written",
        {"kind": "generation", "metric": "contains", "max_new_tokens": 1},
        {"messages": turns, "references": ["x"]},
    )
    write_rows(tmp_path / "test.parquet", [], GROUPED)
    found = list(evaluation_questions(tmp_path / "test.parquet", tmp_path / "b"))
    assert found == [
        ("changed", "1", "Q?"),
        ("changed", "1", "C?"),
        ("facts", "1", "F?"),
        ("reworded", "1", "R?"),
        ("reworded", "1", "V?"),
        ("reworded", "1", "W?"),
        ("written", "1", "Turn?"),
    ]
