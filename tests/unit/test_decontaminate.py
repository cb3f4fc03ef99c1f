"""Evaluation questions must not be in train."""

from typing import Any

from tasks.decontaminate import find_hit, index

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
QUESTIONS = index([("facts", "q1", "Who found Tin?"), ("facts", "q2", LONG)], 13)


def row(question: str, answer: str = "x") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "r", "messages": messages}


def test_an_equal_question_is_a_hit_whatever_its_spelling() -> None:
    hit = find_hit(row("who found TIN"), QUESTIONS, 13)
    assert hit == {
        "id": "r",
        "benchmark": "facts",
        "item": "q1",
        "reason": "same_question",
        "match": "who found tin",
    }


def test_a_question_inside_a_longer_text_is_a_hit_by_its_ngram() -> None:
    hit = find_hit(row(f"Please tell me: {LONG}, now"), QUESTIONS, 13)
    assert hit is not None
    assert (hit["item"], hit["reason"]) == ("q2", "shared_ngram")


def test_an_equal_answer_is_no_hit() -> None:
    assert find_hit(row("What is this?", "Who found Tin?"), QUESTIONS, 13) is None


def test_a_short_question_inside_a_longer_one_is_no_hit() -> None:
    assert find_hit(row("Who found Tin first of all?"), QUESTIONS, 13) is None
