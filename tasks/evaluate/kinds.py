"""Run each kind of benchmark and score the answers, one row per item."""

import math
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, TypedDict

from lm_eval import evaluate
from lm_eval.tasks import TaskManager

from nightshift.core.files import iterate_rows
from nightshift.data.benchmarks import TEST_ANSWERS, Benchmark
from nightshift.data.encode import Encoder
from tasks.evaluate.answers import Answers, render_prompt
from tasks.evaluate.asker import Asker
from tasks.evaluate.scores import WHOLE, Part
from tasks.evaluate.texts import compare, starts_with

Item = dict[str, Any]
# Multiple-choice questions per benchmark that are also answered in writing, and tokens of an answer.
WRITTEN_ITEMS, WRITTEN_TOKENS = 16, 24
# The default of lm-eval.
FEWSHOT_SEED = 1234


class Outcome(TypedDict):
    """Score, status and answer of an item, as in ItemScore."""

    score: float | None
    tokens: None
    status: str
    answer: str


class ScoredItem(Outcome):
    """An outcome, with the choices and the reference answer."""

    choices: int | None
    expected: str | None


class ScoredChoice(ScoredItem):
    """A multiple-choice item, perhaps with the score of a written answer."""

    written: float | None


def score_benchmark(
    model: Asker, benchmark: Benchmark, folder: Path, limit: int | None, part: Part = WHOLE
) -> Iterator[dict[str, Any]]:
    """Run a benchmark and yield one row per item; with a limit, items are evenly spread over it."""
    asked = spread(len(benchmark.items), limit)
    indices = part.select(asked)
    if not indices:
        return
    items = [benchmark.items[i] for i in indices]
    found: Iterator[ScoredItem]
    match benchmark.kind:
        case "choice":
            # The gate does not judge the baseline.
            count = 0 if model.retrieves else WRITTEN_ITEMS
            written = {asked[i] for i in spread(len(asked), count)}
            found = score_choice(model, benchmark, folder, indices, written)
        case "generation":
            found = score_generation(model, benchmark.task, items, render_questions(model, items))
        case "invariance":
            found = score_invariance(model, items)
        case "direction":
            found = score_direction(model, items)
    for item, row in zip(items, found, strict=True):
        yield {
            "benchmark": benchmark.name,
            "item": item["id"],
            "slice": item.get("slice") or benchmark.name,
            "question": item.get("question") or item["messages"][-1]["content"],
            **row,
        }


def score_choice(
    model: Asker, benchmark: Benchmark, folder: Path, indices: Sequence[int], written: Set[int]
) -> Iterator[ScoredChoice]:
    """Score multiple choice by log-likelihood: the metric `acc` of an lm-eval task.

    Args:
        model: Asker.
        benchmark: The benchmark.
        folder: Its folder.
        indices: Positions of the items to score.
        written: Positions of those that are also answered in writing.
    """
    task = {
        **{key: value for key, value in benchmark.task.items() if not key.endswith("_split")},
        "task": benchmark.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
    }
    loaded = TaskManager(include_defaults=False).load([task])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=one.get_config("num_fewshot") or 0)
        one.set_fewshot_seed(seed=FEWSHOT_SEED)
    # Not simple_evaluate, which lists all installed packages every time.
    results = evaluate(
        lm=model,
        task_dict=loaded,
        samples={benchmark.name: list(indices)},
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    samples = results["samples"][benchmark.name]
    asked = [(benchmark.items[i], sample) for i, sample in zip(indices, samples, strict=True) if i in written]
    answers = write_answers(model, *map(list, zip(*asked, strict=True))) if asked else {}
    for index, sample in zip(indices, samples, strict=True):
        item = benchmark.items[index]
        choices = item["choices"]
        # The choices come first; other metrics may have added requests.
        likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"][: len(choices)]]
        found = find_fault(model, likelihoods) or scored_row(
            float(sample["acc"]), choices[likeliest(likelihoods)]
        )
        yield {
            "choices": len(choices),
            "expected": choices[item["answer"]],
            "written": answers.get(item["id"]),
            **found,
        }


def write_answers(model: Asker, items: Sequence[Item], samples: Sequence[Any]) -> dict[str, float]:
    """Let the model answer multiple-choice questions in its own words.

    The gate compares the answers with the likeliest choices: a model that writes the right answers but finds
    them unlikely is not asked in the way that it was trained.

    Args:
        model: Asker.
        items: Items of the benchmark.
        samples: Their results from lm-eval.

    Returns:
        Item id -> 1.0 if the answer starts with the words of the right choice, else 0.0.
    """
    prompts = [model.without_prefix(sample["arguments"][0][0]) for sample in samples]
    answers = model.generate_greedy(prompts, WRITTEN_TOKENS)
    return {
        item["id"]: float(starts_with(answer, item["choices"], item["answer"]))
        for item, answer in zip(items, answers, strict=True)
        if answer is not None
    }


def render_questions(model: Asker, items: Sequence[Item]) -> list[str]:
    """Render the questions or conversations of generation items."""
    return [
        model.render(item.get("messages") or [{"role": "user", "content": item["question"]}])
        for item in items
    ]


def score_generation(
    model: Asker, task: Any, items: Sequence[Item], prompts: Sequence[str]
) -> Iterator[ScoredItem]:
    """Score greedy generation after the prompts against the references."""
    for item, answer in zip(items, model.generate_greedy(prompts, task["max_new_tokens"]), strict=True):
        found = (
            skipped_row(model)
            if answer is None
            else scored_row(compare(task["metric"], answer, item["references"]), answer)
        )
        yield {"choices": None, "expected": " | ".join(item["references"]), **found}


def score_answers(
    model: Asker, encoder: Encoder, test: Path, answers: Answers, part: Part = WHOLE
) -> Iterator[dict[str, Any]]:
    """Generate the last answers of test examples, given all turns before, and compare them exactly.

    An example that the chat template does not render is skipped; see `heldout_losses`.
    """
    asked = set(answers.ids)
    examples = part.select([row for row in iterate_rows(test) if row["id"] in asked])
    items: list[Item] = []
    for row in examples:
        *turns, last = row["messages"]
        prompt = render_prompt([*model.add_notes(turns), last], row, encoder)
        items.append({"references": [last["content"]], "prompt": prompt})
    task = {"metric": "exact_match", "max_new_tokens": answers.max_new_tokens}
    readable = [item for item in items if item["prompt"]]
    found = score_generation(model, task, readable, [item["prompt"] for item in readable])
    for row, item in zip(examples, items, strict=True):
        yield {
            "benchmark": TEST_ANSWERS,
            "item": row["id"],
            "slice": row["source"],
            "question": row["messages"][-2]["content"],
            **(next(found) if item["prompt"] else unrendered_row(item)),
        }


def score_invariance(model: Asker, items: Sequence[Item]) -> Iterator[ScoredItem]:
    """Score invariance (CheckList, Ribeiro et al. 2020): 1 if all wordings share a likeliest choice."""
    wordings = [[item["question"], *item["variants"]] for item in items]
    answers = iter(
        model.choice_likelihoods(
            [(text, item["choices"]) for item, texts in zip(items, wordings, strict=True) for text in texts]
        )
    )
    for item, texts in zip(items, wordings, strict=True):
        likelihoods = [next(answers) for _ in texts]
        if found := find_fault(model, [one for wording in likelihoods for one in wording]):
            yield {"choices": None, "expected": None, **found}
            continue
        first, *others = [item["choices"][likeliest(one)] for one in likelihoods]
        changed = next((other for other in others if other != first), first)
        yield {"choices": None, "expected": first, **scored_row(float(changed == first), changed)}


def score_direction(model: Asker, items: Sequence[Item]) -> Iterator[ScoredItem]:
    """Score directional expectation (CheckList): 1 if the answer's probability moves as expected."""
    answers = iter(
        model.choice_likelihoods(
            [(item[key], item["choices"]) for item in items for key in ("question", "changed")]
        )
    )
    for item in items:
        before, after = next(answers), next(answers)
        answer = item["choices"][item["answer"]]
        found = find_fault(model, [*before, *after])
        if not found:
            old, new = probability(before, item["answer"]), probability(after, item["answer"])
            has_moved = new > old if item["expect"] == "higher" else new < old
            found = scored_row(float(has_moved), f"{old:.4f} -> {new:.4f}")
        yield {"choices": None, "expected": f"{answer}: {item['expect']}", **found}


def spread(count: int, limit: int | None) -> list[int]:
    """Choose at most `limit` of `count` positions, evenly spaced.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def likeliest(likelihoods: Sequence[float]) -> int:
    """Return the index of the highest likelihood, the first one in a tie."""
    return max(range(len(likelihoods)), key=lambda i: likelihoods[i])


def probability(likelihoods: Sequence[float], index: int) -> float:
    """Return the probability of one choice, normalised over all choices.

    Example:
        >>> round(probability([-1.0, -1.0 - math.log(3)], 0), 6)
        0.75
    """
    highest = max(likelihoods)
    weights = [math.exp(one - highest) for one in likelihoods]
    return weights[index] / sum(weights)


def scored_row(score: float, answer: str) -> Outcome:
    """Return the score fields of an answered item."""
    return {"score": score, "status": "ok", "answer": answer, "tokens": None}


def find_fault(model: Asker, likelihoods: Sequence[float]) -> Outcome | None:
    """Return the fields of an item without a score, or None if all likelihoods are finite."""
    if any(math.isnan(one) for one in likelihoods):
        return error_row("a log-likelihood is not a number")
    return None if all(math.isfinite(one) for one in likelihoods) else skipped_row(model)


def error_row(reason: str) -> Outcome:
    """Return the fields of an item for which the model returned no number."""
    return {"score": None, "status": "error", "answer": reason, "tokens": None}


def unrendered_row(item: Item) -> ScoredItem:
    """Return the fields of a test example that the model's chat template does not render."""
    reason = "the chat template does not render it"
    unasked: Outcome = {"score": None, "status": "skipped", "answer": reason, "tokens": None}
    return {"choices": None, "expected": item["references"][0], **unasked}


def skipped_row(model: Asker) -> Outcome:
    """Return the fields of an item that is too long for the model."""
    reason = f"longer than the model's context of {model.max_length} tokens"
    return {"score": None, "status": "skipped", "answer": reason, "tokens": None}
