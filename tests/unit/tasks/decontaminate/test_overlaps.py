"""What decontaminate finds in rows, in one process or in several."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nightshift.core.files import jsonl, read_json, read_rows, tree_digest, write_rows, write_text
from nightshift.core.paths import AUGMENTED_TRAIN, BENCHMARKS, CLEAN_TRAIN, PLACED, PREFERENCES, TEST
from nightshift.data.benchmarks import CHOICE_TASK, Question
from nightshift.data.schemas import AUGMENTED, GROUPED, PLACED_PREFERENCES
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate import __main__ as stage
from tasks.decontaminate.index import build_index
from tasks.decontaminate.overlaps import search
from tests.helpers.questions import with_forms

PARAMS: dict[str, Any] = {
    "ngram_size": 13,
    "min_question_words": 5,
    "max_containment": 0.8,
    "max_drop_rate": 1.0,
}
THRESHOLDS = DecontaminateParams(**PARAMS)


def chat(number: int, question: str, answer: str = "x", **more: Any) -> Any:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    origin = f"chats/000001.jsonl:{number}"
    empty = dict.fromkeys(name for name in AUGMENTED.names if name not in ("messages", "id"))
    return {**empty, "id": f"r{number}", "messages": messages, "source": "chats", "origin": origin, **more}


def compared(number: int, rejected: str, side: str = "train", **more: Any) -> Any:
    prompt = [{"role": "user", "content": f"tell me of the {number}th year {'so ' * number}— é"}]
    row = {"id": f"p{number}", "prompt": prompt, "rejected": [{"role": "assistant", "content": rejected}]}
    origin = f"chats/000001.jsonl:{number}"
    return {**row, "example_id": f"r{number}", "source": "chats", "origin": origin, "side": side, **more}


def test_several_processes_write_the_same_bytes_as_one(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(Path("params.yaml"), yaml.safe_dump({"decontaminate": PARAMS}))
    asked = "in which year was the element gallium found in France"
    write_text(BENCHMARKS / "facts" / "task.yaml", yaml.safe_dump(CHOICE_TASK))
    item = {"id": "q", "question": asked, "choices": ["1875", "1876"], "answer": 0}
    write_text(BENCHMARKS / "facts" / "items.jsonl", jsonl([item]))
    held = "where did you put my blue umbrella this morning"
    write_rows(TEST, [{name: chat(99, held).get(name) for name in GROUPED.names}], GROUPED)
    rows = [chat(i, f"tell me of the {i}th year {'so ' * i}— é", f"It was {i}.") for i in range(20)]
    rows[3] = chat(3, "A quiz!", f"1. {asked}?")
    rows[17] = chat(17, f"{held}, friend")
    write_rows(AUGMENTED_TRAIN, rows, AUGMENTED)
    write_rows(PLACED, [compared(3, f"1. {asked}?"), compared(4, "No.")], PLACED_PREFERENCES)
    stage.main()
    alone = tree_digest(CLEAN_TRAIN.parent)
    monkeypatch.setattr(stage, "MANY_BYTES", 0)
    monkeypatch.setattr(stage, "ROWS_PER_WORK", 3)
    stage.main()
    assert tree_digest(CLEAN_TRAIN.parent) == alone
    summary = read_json(CLEAN_TRAIN.parent / "summary.json")
    assert summary["dropped"] == {"shared_ngram": 2}
    assert summary["compared"] == {"overlap": 1, "train": 1}
    assert [row["id"] for row in read_rows(CLEAN_TRAIN)] == [
        f"r{number}" for number in range(20) if number not in (3, 17)
    ]


def test_a_row_counts_once_for_each_passage_and_a_paraphrase_does_not() -> None:
    question = Question("facts", "q", "one two three four five")
    passages = build_index(with_forms([question]), THRESHOLDS, is_test=False).passages
    nothing = build_index([], THRESHOLDS, is_test=True).passages
    twice = chat(1, "one two three", "one two three four six seven")
    found = search(
        [twice, chat(2, "one two three", parent_id="r1"), chat(3, "no")], passages, nothing, THRESHOLDS
    )
    assert found.sources == {"chats": 3}
    assert [row.id for row, _ in found.rows] == ["r1", "r2"]
    (texts, in_test) = found.rows[0][1]
    assert [one.text for one in texts] == ["one two three", "one two three four six seven"]
    assert in_test == []
    names = {number: shingle for shingle, number in passages.shingles.items()}
    uses, _ = found.uses
    assert Counter(names[number] for number in uses.shingles.tolist()) == {
        "one two three": 1,
        "two three four": 1,
    }
    assert uses.ngrams == {}


def test_the_index_finds_the_questions_with_a_shingle() -> None:
    texts = ["a b c d e", "x y z", "b c d e f", "a b c"]
    asked = with_forms(Question("facts", str(i), text) for i, text in enumerate(texts))
    params = DecontaminateParams(**{**PARAMS, "min_question_words": 3})
    index = build_index(asked, params, is_test=False)
    numbers = index.passages.shingles
    owners = {name: index.count_owners(np.array([number]))[0].tolist() for name, number in numbers.items()}
    assert owners == {"a b c": [0, 3], "b c d": [0, 2], "c d e": [0, 2], "d e f": [2], "x y z": [1]}
    positions, counts = index.count_owners(np.array([numbers["a b c"], numbers["b c d"]]))
    assert (positions.tolist(), counts.tolist()) == ([0, 2, 3], [2, 1, 1])
    assert index.count_owners(np.empty(0, np.int32))[0].tolist() == []
    is_counted = np.array([name != "b c d" for name in numbers])
    assert index.count_shingles(is_counted).tolist() == [2, 1, 2, 1]


def test_a_comparison_that_overlaps_with_an_evaluation_question_is_left_out(in_tmp: Path) -> None:
    write_text(Path("params.yaml"), yaml.safe_dump({"decontaminate": PARAMS}))
    asked = "in which year was the element gallium found in France"
    write_text(BENCHMARKS / "facts" / "task.yaml", yaml.safe_dump(CHOICE_TASK))
    item = {"id": "q", "question": asked, "choices": ["1875", "1876"], "answer": 0}
    write_text(BENCHMARKS / "facts" / "items.jsonl", jsonl([item]))
    held = "where did you put my blue umbrella this morning"
    write_rows(TEST, [{name: chat(99, held).get(name) for name in GROUPED.names}], GROUPED)
    write_rows(AUGMENTED_TRAIN, [chat(i, f"tell me of the {i}th year") for i in range(3)], AUGMENTED)
    near = [{"role": "user", "content": f"{held}, friend"}]
    rows = [
        compared(0, "No."),
        compared(1, f"1. {asked}?"),
        *(compared(number, "No.", prompt=near, example_id=None) for number in range(2, 7)),
        compared(7, "No.", example_id="r-of-a-row-that-is-gone"),
        compared(8, f"1. {asked}?", side="validation"),
        compared(9, "No.", side="test"),
    ]
    write_rows(PLACED, rows, PLACED_PREFERENCES)
    stage.main()
    assert [row["id"] for row in read_rows(PREFERENCES)] == ["p0", "p8"]
    summary = read_json(CLEAN_TRAIN.parent / "summary.json")
    assert summary["compared"] == {"overlap": 7, "test": 1, "train": 1, "validation": 1}
    assert (summary["rows_in"], summary["dropped"]) == (3, {})
