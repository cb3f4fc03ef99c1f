"""Benchmark files: valid contents, and all errors reported at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.errors import DataError
from nightshift.core.files import jsonl, write_text
from nightshift.data.benchmarks import CHOICE_TASK, questions, read_benchmarks

CHOICE = {"id": "a", "question": "Q?", "choices": ["x", "y"], "answer": 1}
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "choice": (CHOICE_TASK, CHOICE),
    "generation": (
        {"kind": "generation", "metric": "contains", "max_new_tokens": 4},
        {"id": "a", "slice": "s", "question": "Q?", "references": ["x"]},
    ),
    "invariance": (
        {"kind": "invariance"},
        {"id": "a", "question": "Q?", "variants": ["R?"], "choices": ["x", "y"]},
    ),
    "direction": ({"kind": "direction"}, {**CHOICE, "changed": "C?", "expect": "higher"}),
}


def put(root: Path, name: str, task: Any, *items: dict[str, Any]) -> None:
    write_text(root / name / "task.yaml", yaml.safe_dump(task))
    write_text(root / name / "items.jsonl", jsonl(items))


def faults(root: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_benchmarks(root)
    return [line.strip().replace(f"{root}/", "") for line in str(caught.value).splitlines()[1:]]


def test_all_kinds_are_read_in_order_of_name(tmp_path: Path) -> None:
    for kind, (task, item) in GOOD.items():
        put(tmp_path, kind, task, item)
    found = read_benchmarks(tmp_path)
    assert [(one.name, one.kind) for one in found] == [(kind, kind) for kind in sorted(GOOD)]
    assert found[0].items == [CHOICE]


def test_a_paraphrase_names_an_item_of_its_benchmark(tmp_path: Path) -> None:
    put(tmp_path, "facts", CHOICE_TASK, {**CHOICE, "id": "b", "paraphrase_of": CHOICE["id"]}, CHOICE)
    (known,) = read_benchmarks(tmp_path)
    assert known.items[0]["paraphrase_of"] == CHOICE["id"]
    put(tmp_path, "facts", CHOICE_TASK, CHOICE, {**CHOICE, "id": "b", "paraphrase_of": "c"})
    assert faults(tmp_path) == [
        "facts/items.jsonl:2: paraphrase_of 'c' is no item of this benchmark; correct the id or remove it"
    ]


def test_all_problems_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    task, item = GOOD["generation"]
    put(tmp_path, "facts", CHOICE_TASK, CHOICE, {**CHOICE, "id": "b", "answer": 2}, CHOICE)
    put(tmp_path, "written", {**task, "metric": "bleu"}, item, {**item, "id": "b", "referenzes": ["x"]})
    put(tmp_path, "normed", {**CHOICE_TASK, "metric_list": [{"metric": "acc_norm"}]}, CHOICE)
    put(tmp_path, "poem", {"kind": "poetry"}, item)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "items.jsonl").write_text("{}")
    assert faults(tmp_path) == [
        "facts/items.jsonl:2: answer 2 is out of range for 2 choices; count from 0",
        "facts/items.jsonl:3: duplicate id 'a', also in line 1; rename one",
        "normed/task.yaml: metric_list must contain acc, which is the score; add it",
        "poem/task.yaml: unknown kind 'poetry'; use generation, invariance or direction, or omit it for "
        "lm-eval",
        "written/task.yaml.metric: Input should be 'exact_match', 'contains', 'token_f1' or 'rouge_l', "
        "got 'bleu'",
        "written/items.jsonl:2.referenzes: unknown key; did you mean references?",
        "lost: has no task.yaml; add one that defines how to ask",
    ]


def test_missing_empty_and_malformed_files_are_reported(tmp_path: Path) -> None:
    put(tmp_path, "empty", CHOICE_TASK)
    put(tmp_path, "gone", CHOICE_TASK)
    (tmp_path / "gone" / "items.jsonl").unlink()
    put(tmp_path, "test", CHOICE_TASK)
    put(tmp_path, "test_answers", CHOICE_TASK, GOOD["choice"][1])
    (tmp_path / "test" / "items.jsonl").write_text('\n{"id": \n')
    assert faults(tmp_path) == [
        "empty/items.jsonl: no items; add at least one",
        "gone/items.jsonl: not found; add the benchmark's items",
        "test: this name is reserved for the held-out examples; use another one",
        "test/items.jsonl:2: not valid JSON: Expecting value; write one object per line",
        "test_answers: this name is reserved for the held-out examples; use another one",
    ]


def test_a_generation_item_has_either_a_question_or_messages(tmp_path: Path) -> None:
    task, item = GOOD["generation"]
    turns = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    both = {**item, "messages": turns[:1]}
    ends_wrong = {"id": "b", "references": ["x"], "messages": turns}
    put(tmp_path, "written", task, both, ends_wrong)
    assert faults(tmp_path) == [
        "written/items.jsonl:1: needs either question or messages; give exactly one",
        "written/items.jsonl:2: messages must end with a user turn; move the answer to references",
    ]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    put(tmp_path, "facts", CHOICE_TASK, {**CHOICE, "question": "One\u2028two?"})
    assert read_benchmarks(tmp_path)[0].items[0]["question"] == "One\u2028two?"


def test_questions_include_all_wordings_but_no_answers() -> None:
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    assert list(questions({"id": "a", "references": ["x"], "messages": turns})) == ["One?\nTwo?"]
    assert list(questions(GOOD["direction"][1])) == ["Q?", "C?"]


def test_only_benchmarks_in_use_are_read_and_they_must_exist(tmp_path: Path) -> None:
    put(tmp_path, "facts", CHOICE_TASK, CHOICE)
    put(tmp_path, "old", {"kind": "poetry"})
    (tmp_path / "used.json").write_text('["facts"]')
    assert [one.name for one in read_benchmarks(tmp_path)] == ["facts"]
    (tmp_path / "used.json").write_text('["facts", "lost"]')
    assert faults(tmp_path) == ["lost: has no task.yaml; add one that defines how to ask"]
