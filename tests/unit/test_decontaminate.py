"""Evaluation questions must not be in train."""

from typing import Any

from tasks.decontaminate import DecontaminateParams, build_index, find_hit

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SHORT = "In which year was gallium found?"
PARAMS = DecontaminateParams(ngram_size=13, min_question_words=5, max_containment=0.8)
ITEMS = [("facts", "q1", "Who found Tin?"), ("facts", "q2", LONG), ("facts", "q3", SHORT)]
QUESTIONS = build_index(ITEMS, PARAMS)


def row(question: str, answer: str = "x", role: str = "user") -> dict[str, Any]:
    messages = [{"role": role, "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "r", "origin": "chats/000001.jsonl:7", "messages": messages}


def hit(question: str, answer: str = "x", role: str = "user") -> tuple[str, str] | None:
    found = find_hit(row(question, answer, role), QUESTIONS, PARAMS)
    return (found["item"], found["reason"]) if found else None


def test_an_equal_question_is_a_hit_whatever_its_spelling() -> None:
    assert find_hit(row("who found TIN"), QUESTIONS, PARAMS) == {
        "id": "r",
        "origin": "chats/000001.jsonl:7",
        "benchmark": "facts",
        "item": "q1",
        "reason": "same_question",
        "match": "who found tin",
        "containment": 1.0,
    }


def test_a_question_inside_a_longer_text_is_a_hit_by_its_ngram() -> None:
    assert hit(f"Please tell me: {LONG}, now") == ("q2", "shared_ngram")
    # 13 of its 15 words in a row are enough, 12 are not (10 of 13 shingles are contained).
    assert hit(" ".join(["so", *LONG.split()[:13], "end"])) == ("q2", "shared_ngram")
    assert hit(" ".join(["so", *LONG.split()[:12], "end"])) is None


def test_a_question_shorter_than_the_ngram_is_a_hit_by_all_its_words() -> None:
    assert hit("Tell me, in which year was gallium found? Thanks!") == ("q3", "shared_ngram")
    assert hit("In which year was thallium found?") is None


def test_a_question_that_is_scattered_over_a_text_is_a_hit_by_containment() -> None:
    # 11 of its 13 shingles are there, but never 13 words in a row.
    words = LONG.split()
    assert hit(" ".join([*words[:8], "and", "then", *words[6:]])) == ("q2", "contained_question")


def test_a_plain_text_is_searched_like_a_question() -> None:
    assert hit(f"A book says: {LONG}.", role="text") == ("q2", "shared_ngram")


def test_an_equal_answer_is_no_hit() -> None:
    assert hit("What is this?", "Who found Tin?") is None
    assert hit("What is this?", LONG) is None


def test_a_very_short_question_inside_a_longer_one_is_no_hit() -> None:
    assert hit("Who found Tin first of all?") is None
