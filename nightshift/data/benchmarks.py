"""Benchmark files: `data/benchmarks/<name>/` contains task.yaml (how to ask) and items.jsonl (items).

task.yaml is a multiple-choice task of lm-eval, or with the key `kind` a Nightshift task. Needs no torch:
the questions must be known long before a model answers them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import ConfigDict, Field, model_validator

from nightshift.core.config import Count, StageParams, problems
from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, iterate_rows
from nightshift.data.used import read_used

# Benchmark name of the held-out test set in the table of scores.
HELDOUT = "test"
# Benchmark of generated answers to test examples (`evaluate.exact_match`).
TEST_ANSWERS = "test_answers"
# Benchmarks whose items are test examples.
OF_TEST_EXAMPLES = (HELDOUT, TEST_ANSWERS)
# lm-eval multiple-choice task for items that match `ChoiceItem`.
CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
Text = Annotated[str, Field(min_length=1)]
Kind = Literal["choice", "generation", "invariance", "direction"]
Metric = Literal["exact_match", "contains", "token_f1", "rouge_l"]


class ChoiceTask(StageParams):
    """Task in lm-eval format; lm-eval validates its other keys. The data file is always items.jsonl."""

    model_config = ConfigDict(extra="allow")
    output_type: Literal["multiple_choice"]
    doc_to_text: Any
    doc_to_choice: Any
    doc_to_target: Any
    # lm-eval's default includes acc.
    metric_list: list[dict[str, Any]] = Field(default=[{"metric": "acc"}])

    @model_validator(mode="after")
    def _require_accuracy(self) -> "ChoiceTask":
        if "acc" not in (metric.get("metric") for metric in self.metric_list):
            raise ValueError("metric_list must contain acc, which is the score; add it")
        return self


class GenerationTask(StageParams):
    """Generated answer of at most `max_new_tokens`; `metric` compares it with the references."""

    kind: Literal["generation"]
    metric: Metric
    max_new_tokens: Count


class InvarianceTask(StageParams):
    """The most likely choice must be the same for a question and for its rephrasings."""

    kind: Literal["invariance"]


class DirectionTask(StageParams):
    """The probability of the answer must move as expected when the question changes."""

    kind: Literal["direction"]


class Item(StageParams):
    """Fields of every item.

    Attributes:
        id: Name of the item, unique within a benchmark.
        slice: Part of the benchmark that is reported and guarded separately; None: the whole.
        cluster: What the item is about, if several are about the same, also in other benchmarks: a fact, a
            document. They count as one in the gate's tests. None: decontaminate finds related questions.
        paraphrase_of: Id of the item in the same benchmark that this one asks in other words, or None.
    """

    id: Text
    slice: Text | None = None
    cluster: Text | None = None
    paraphrase_of: Text | None = None


class ChoiceItem(Item):
    """A question and choices; `answer` is the index of the correct one. The task may use other keys."""

    model_config = ConfigDict(extra="allow")
    question: Text
    choices: Annotated[list[Text], Field(min_length=2)]
    answer: Annotated[int, Field(strict=True, ge=0)]

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "ChoiceItem":
        require_choice(self.answer, self.choices)
        return self


class Turn(StageParams):
    """One turn of a conversation that ends with the question."""

    role: Literal["system", "user", "assistant"]
    content: Text


class GenerationItem(Item):
    """A question, or turns that end with a question, and reference answers."""

    question: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    references: Annotated[list[Text], Field(min_length=1)]

    @model_validator(mode="after")
    def _require_question(self) -> "GenerationItem":
        if (self.question is None) == (self.messages is None):
            raise ValueError("needs either question or messages; give exactly one")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("messages must end with a user turn; move the answer to references")
        return self


class InvarianceItem(Item):
    """A question, its rephrasings, and the choices."""

    question: Text
    variants: Annotated[list[Text], Field(min_length=1)]
    choices: Annotated[list[Text], Field(min_length=2)]


class DirectionItem(Item):
    """A question, its changed version, and the expected shift in probability of `choices[answer]`."""

    question: Text
    changed: Text
    choices: Annotated[list[Text], Field(min_length=2)]
    answer: Annotated[int, Field(strict=True, ge=0)]
    expect: Literal["higher", "lower"]

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "DirectionItem":
        require_choice(self.answer, self.choices)
        return self


KINDS: dict[Kind, tuple[type[StageParams], type[Item]]] = {
    "choice": (ChoiceTask, ChoiceItem),
    "generation": (GenerationTask, GenerationItem),
    "invariance": (InvarianceTask, InvarianceItem),
    "direction": (DirectionTask, DirectionItem),
}


def require_choice(answer: int, choices: list[str]) -> None:
    """Raise ValueError if the answer is not the index of a choice."""
    if answer >= len(choices):
        raise ValueError(f"answer {answer} is out of range for {len(choices)} choices; count from 0")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark with validated files."""

    name: str
    kind: Kind
    task: Mapping[str, Any]
    items: list[dict[str, Any]]


def read_benchmarks(root: Path) -> list[Benchmark]:
    """Read the benchmarks in use from a folder, in order of name.

    Raises:
        DataError: Files violate the format; the message lists every problem, with file and line.
    """
    faults: list[str] = []
    used = [root / name for name in sorted(read_used(root))]
    found = [read_benchmark(folder, faults) for folder in used if (folder / "task.yaml").is_file()]
    alone = [folder for folder in used if not (folder / "task.yaml").is_file()]
    faults += [f"{folder}: has no task.yaml; add one that defines how to ask" for folder in alone]
    if faults:
        raise DataError("\n  ".join([f"{root}: {len(faults)} problem(s) with the benchmarks", *faults]))
    return found


def task_digests(root: Path) -> dict[str, str]:
    """Return the digest of the task.yaml of each benchmark in use: how its items are asked and scored."""
    return {name: file_digest(root / name / "task.yaml") for name in sorted(read_used(root))}


def read_benchmark(folder: Path, faults: list[str]) -> Benchmark:
    """Read one benchmark; append its problems to `faults`."""
    file = folder / "task.yaml"
    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as err:
        faults.append(f"{file}: not valid YAML: {err}; fix the reported line")
        task = {}
    task = task if isinstance(task, dict) else {}
    kind = task.get("kind", "choice")
    if kind not in KINDS:
        faults.append(
            f"{file}: unknown kind {kind!r}; use generation, invariance or direction, or omit it for lm-eval"
        )
        return Benchmark(folder.name, "choice", {}, [])
    task_schema, item_schema = KINDS[kind]
    faults += problems(task_schema, str(file), task)
    if folder.name in OF_TEST_EXAMPLES:
        faults.append(f"{folder}: this name is reserved for the held-out examples; use another one")
    return Benchmark(folder.name, kind, task, read_items(folder / "items.jsonl", item_schema, faults))


def read_items(file: Path, schema: type[Item], faults: list[str]) -> list[dict[str, Any]]:
    """Read the items of a benchmark; append their problems to `faults`."""
    if not file.is_file():
        faults.append(f"{file}: not found; add the benchmark's items")
        return []
    items: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as err:
            faults.append(f"{where}: not valid JSON: {err.msg}; write one object per line")
            continue
        found = problems(schema, where, item)
        faults += found
        if found:
            continue
        if item["id"] in seen:
            faults.append(
                f"{where}: duplicate id {item['id']!r}, also in line {seen[item['id']]}; rename one"
            )
        seen.setdefault(item["id"], number)
        items.append(item)
    for item in items:
        if (original := item.get("paraphrase_of")) and original not in seen:
            faults.append(
                f"{file}:{seen[item['id']]}: paraphrase_of {original!r} is no item of this benchmark; "
                "correct the id or remove it"
            )
    if not seen and not any(fault.startswith(f"{file}:") for fault in faults):
        faults.append(f"{file}: no items; add at least one")
    return items


def questions(item: Mapping[str, Any]) -> Iterator[str]:
    """Yield every question of an item, in every wording; the user turns of a conversation are one question.

    Example:
        >>> list(questions({"question": "Who?", "variants": ["What person?"], "choices": ["I", "you"]}))
        ['Who?', 'What person?']
    """
    yield from (item[key] for key in ("question", "changed") if item.get(key))
    yield from item.get("variants", ())
    if item.get("messages"):
        yield "\n".join(questions_of(item))


class Question(NamedTuple):
    """A question of a benchmark item in one of its wordings, or the prompt of a test example.

    Attributes:
        benchmark: Name of the benchmark; `test` for a test example.
        item: Id of the item.
        text: Question.
        cluster: Cluster that the item names, or group of the example; None if there is none.
        paraphrase_of: Id of the item that this one asks in other words, or None.
    """

    benchmark: str
    item: str
    text: str
    cluster: str | None = None
    paraphrase_of: str | None = None


def evaluation_questions(test: Path, benchmarks: Path) -> Iterator[Question]:
    """Yield the questions of all evaluation data, in every wording.

    Raises:
        DataError: A benchmark violates the format.
    """
    for row in iterate_rows(test, ["id", "messages", "group"]):
        yield Question(HELDOUT, row["id"], prompt_of(row), row["group"])
    for benchmark in read_benchmarks(benchmarks):
        for item in benchmark.items:
            for text in questions(item):
                related = (item.get("cluster"), item.get("paraphrase_of"))
                yield Question(benchmark.name, item["id"], text, *related)


def questions_of(row: Mapping[str, Any]) -> list[str]:
    """Return the questions of a row: its user turns, or its plain text."""
    return [turn["content"] for turn in row["messages"] if turn["role"] in ("user", "text")]


def answers_of(row: Mapping[str, Any]) -> list[str]:
    """Return the answers of a row."""
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]


def prompt_of(row: Mapping[str, Any]) -> str:
    """Return all turns of a row but the assistant's as one text.

    It identifies a conversation, unlike one turn: many chats contain "Thanks!", and many documents in a
    system turn are followed by the same question.
    """
    return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] != "assistant")
