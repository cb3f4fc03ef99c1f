"""Evaluation questions must not be in the training set."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.files import jsonl, write_rows, write_text
from nightshift.data.benchmarks import CHOICE_TASK, Question, evaluation_questions, prompt_of
from nightshift.data.schemas import GROUPED
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate.hits import Hit
from tasks.decontaminate.index import build_index
from tests.helpers.questions import hits_of, with_forms

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SHORT = "In which year was gallium found?"
PARAMS = DecontaminateParams(ngram_size=13, min_question_words=5, max_containment=0.8, max_drop_rate=1.0)
ITEMS = [
    Question("facts", "q1", "Who found Tin?"),
    Question("facts", "q2", LONG),
    Question("facts", "q3", SHORT),
]
BENCHMARKS = build_index(with_forms(ITEMS), PARAMS, is_test=False)
NOTHING = build_index([], PARAMS, is_test=True)


def row(*turns: str, role: str = "user", number: int = 7) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "origin": f"chats/000001.jsonl:{number}",
        "source": "chats",
        "parent_id": None,
        "messages": [
            {"role": (role, "assistant")[i % 2], "content": content} for i, content in enumerate(turns)
        ],
    }


def find_hit(question: str, answer: str = "x", role: str = "user") -> Hit | None:
    return hits_of([row(question, answer, role=role)], BENCHMARKS, NOTHING, PARAMS).get("r7")


def hit(question: str, answer: str = "x", role: str = "user") -> tuple[str, str] | None:
    found = find_hit(question, answer, role)
    return (found["item"], found["reason"]) if found else None


def hits_of_test(rows: list[dict[str, Any]], *test: dict[str, Any]) -> list[str]:
    """Return the ids of the rows that overlap with test examples."""
    questions = [Question("test", one["id"], prompt_of(one)) for one in test]
    index = build_index(with_forms(questions), PARAMS, is_test=True)
    return list(hits_of(rows, NOTHING, index, PARAMS))


def test_an_equal_question_is_a_hit_regardless_of_case_and_punctuation() -> None:
    assert find_hit("who found TIN") == {
        "id": "r7",
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


def test_an_answer_that_is_a_short_question_is_not_a_hit() -> None:
    assert hit("What is this?", "Who found Tin?") is None


def test_a_question_in_an_answer_is_a_hit() -> None:
    assert hit("Make a quiz.", f"1. {SHORT} In 1875.") == ("q3", "shared_ngram")
    assert hit("Make a quiz.", f"1. {LONG}? Sixteen.") == ("q2", "shared_ngram")
    assert hit("Ask me something.", SHORT) == ("q3", "same_question")
    # A statement of the same fact is no question.
    assert hit("What about gallium?", "Gallium was found in the year 1875.") is None


def test_a_very_short_question_inside_a_longer_one_is_not_a_hit() -> None:
    assert hit("Who found Tin first of all?") is None


def test_a_passage_that_many_rows_share_is_a_template_and_no_hit() -> None:
    def hits(count: int) -> list[str]:
        rows = [row(f"{LONG} {'so' * i} what", "x", number=i) for i in range(count)]
        return list(hits_of(rows, BENCHMARKS, NOTHING, PARAMS))

    assert hits(10) == [f"r{i}" for i in range(10)]
    assert hits(11) == []


def test_a_question_that_many_rows_repeat_word_for_word_is_still_a_hit() -> None:
    rows = [row("Hello", "Hi!", LONG, f"answer {i}", number=i) for i in range(20)]
    found = hits_of(rows, BENCHMARKS, NOTHING, PARAMS)
    assert [hit["reason"] for hit in found.values()] == ["same_question"] * 20


def test_a_paraphrase_does_not_make_its_source_a_template() -> None:
    family = [row(f"So {LONG}", "x", number=0)]
    family += [row(f"{LONG} {i}", "x", number=i) | {"parent_id": "r0"} for i in range(1, 30)]
    assert len(hits_of(family, BENCHMARKS, NOTHING, PARAMS)) == 30


def test_a_test_conversation_is_compared_as_a_whole() -> None:
    held = row("Where is my parcel number seven?", "There.", "No, that is all for today, thanks!", "Bye!")
    same_end = row("Who pays the bill of last week?", "You.", "No, that is all for today, thanks!", "Bye!")
    same = row("Where is my parcel number seven?", "I look.", "No, that is all for today, thanks!", "Bye!")
    assert hits_of_test([same_end | {"id": "end"}, same | {"id": "same"}], held) == ["same"]


def test_questions_about_a_document_of_a_test_example_are_no_hits() -> None:
    document = " ".join(f"d{i}" for i in range(150))
    asked = [row(f"{document} {' '.join(f'q{i}{j}' for j in range(8))}", "x", number=i) for i in range(4)]
    held = row(f"{document} what is the seventh word of it all", "x", number=9)
    copy = row(f"{document} what is the seventh word of it all now", "x", number=5)
    assert hits_of_test(asked, held) == hits_of_test(asked[:1], held) == []
    assert hits_of_test([*asked, copy], held) == ["r5"]


def test_an_absolute_value_is_asked_for_each_number() -> None:
    rows = [row(f"What is the absolute value of {number}?", "x", number=number) for number in range(5, 50)]
    assert hits_of_test(rows, row("What is the absolute value of 4?")) == []


@pytest.mark.parametrize(
    ("question", "text", "is_hit"),
    [
        ("北京的人口有多少万人呢", "请告诉我,北京的人口有多少万人呢?谢谢", True),
        ("北京的人口在去年底有多少万人呢", "请告诉我,北京的总人口在去年底有多少万人呢?谢谢", True),
        ("北京的人口有多少万人呢", "请告诉我,上海的天气有什么变化呢?谢谢", False),
        ("東京の人口は何人ですか教えて", "すみません、東京の人口は何人ですか教えてください。", True),
        ("ประเทศไทยมีประชากรกี่คนในปีนี้", "ช่วยบอกหน่อยว่าประเทศไทยมีประชากรกี่คนในปีนี้ครับ", True),
        ("ประเทศไทยมีประชากรกี่คนในปีนี้", "ประเทศลาวมีแม่น้ำกี่สายที่ไหลลงสู่ทะเล", False),
    ],
)
def test_scripts_without_spaces_are_compared_by_characters(question: str, text: str, *, is_hit: bool) -> None:
    index = build_index(with_forms([Question("facts", "q", question)]), PARAMS, is_test=False)
    assert bool(hits_of([row(text)], index, NOTHING, PARAMS)) == is_hit


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
        ("changed", "1", "Q?", None, None),
        ("changed", "1", "C?", None, None),
        ("facts", "1", "F?", None, None),
        ("reworded", "1", "R?", None, None),
        ("reworded", "1", "V?", None, None),
        ("reworded", "1", "W?", None, None),
        ("written", "1", "Turn?", None, None),
    ]
