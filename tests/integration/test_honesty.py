"""The gate stage on planted frauds: each gets the verdict of an honest evaluation."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from nightshift.core.errors import DataError
from nightshift.core.files import jsonl, read_json, write_json, write_rows, write_text
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.data.encode import load_encoder
from nightshift.data.schemas import ALL_SCORES, AUGMENTED, GROUPED
from tasks.evaluate.model import Model
from tasks.evaluate.score import heldout_losses
from tasks.gate import __main__ as gate
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import conversation

ITEMS = 200
Judge = Callable[..., dict[str, Any]]


def answers(model: str, right: np.ndarray) -> list[dict[str, Any]]:
    rows = [
        {
            "model": model,
            "benchmark": "facts",
            "item": f"{i:03}",
            "slice": str(i % 4),
            "score": float(one),
            "tokens": None,
            "choices": 4,
            "status": "ok",
        }
        for i, one in enumerate(right)
    ]
    test = {"benchmark": "test", "slice": "s", "score": 20.0, "tokens": 10, "choices": None, "status": "ok"}
    return [*rows, *({"model": model, "item": str(i), **test} for i in range(3))]


def chance(share: float, seed: int) -> np.ndarray:
    """Return correct answers to this share of all items, at random."""
    return np.random.default_rng(seed).random(ITEMS) < share


@pytest.fixture
def judge(in_tmp: Path) -> Judge:
    """Return a function that writes the stage's inputs, runs it and returns its verdict."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["gate"] |= {"retention": {}, "behaviour": []}
    (in_tmp / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    write_json(gate.CHAMPION_RECORD, {"version": None, "digest": None, "arrival": None, "best": {}})
    write_json(gate.MODELS, {"base": None, "candidate": "c"})
    write_rows(gate.TEST, [conversation(i) for i in range(3)], GROUPED)

    def run(
        rows: list[dict[str, Any]], asked: str = "What is trained?", items: int = ITEMS
    ) -> dict[str, Any]:
        answer = {"choices": ["a", "b", "c", "d"], "answer": 0}
        questions = [{"id": f"{i:03}", "question": f"What is element {i}?", **answer} for i in range(items)]
        write_text(gate.BENCHMARKS / "facts" / "items.jsonl", jsonl(questions))
        write_text(gate.BENCHMARKS / "facts" / "task.yaml", yaml.safe_dump(CHOICE_TASK))
        turns = {"user": asked, "assistant": "An answer."}
        messages = [
            {"role": role, "content": content, "tool_calls": None, "name": None}
            for role, content in turns.items()
        ]
        more = {"parent_id": None, "style": None, "ordinal": None}
        row = {**conversation(7), "origin": "facts/000001.jsonl:7", "messages": messages, **more}
        write_rows(gate.CLEAN_TRAIN, [row], AUGMENTED)
        write_rows(gate.SCORES, rows, ALL_SCORES)
        gate.main()
        verdict: dict[str, Any] = read_json(gate.GATE)
        assert json.loads(Path("data/gate/summary.json").read_text())["verdict"] == verdict["verdict"]
        return verdict

    return run


def test_a_model_that_learned_is_promoted_and_rejected_when_swapped_with_its_base(judge: Judge) -> None:
    learned, base = chance(0.7, 1), chance(0.45, 2)
    assert judge(answers("candidate", learned) + answers("base", base))["verdict"] == "promote"
    assert judge(answers("candidate", base) + answers("base", learned))["verdict"] == "reject"


def test_a_model_trained_on_shuffled_labels_is_rejected(judge: Judge) -> None:
    # Accuracy at chance level, one of four choices.
    verdict = judge(answers("candidate", chance(0.25, 3)) + answers("base", chance(0.45, 2)))
    assert verdict["verdict"] == "reject"
    assert verdict["reason"].startswith("gain: worse: -")


def test_a_model_trained_on_the_benchmark_itself_is_an_error(judge: Judge) -> None:
    rows = answers("candidate", chance(0.99, 1)) + answers("base", chance(0.45, 2))
    verdict = judge(rows, asked="what is ELEMENT 12 ?")
    assert verdict["verdict"] == "error"
    assert "first: facts/000001.jsonl:7 matches facts/012" in verdict["reason"]


def test_an_empty_benchmark_is_an_error_and_none_leaves_the_verdict_to_the_test_set(judge: Judge) -> None:
    with pytest.raises(DataError, match="no items; add at least one"):
        judge([], items=0)
    only_test = [row for row in answers("candidate", chance(0.7, 1)) if row["benchmark"] == "test"]
    only_test += [row for row in answers("base", chance(0.7, 1)) if row["benchmark"] == "test"]
    verdict = judge(only_test)
    assert (verdict["verdict"], verdict["reason"]) == (
        "hold",
        "gain: too few test examples: 3 of the 50 that gate.min_items requires; add data or raise "
        "split.test_share",
    )


def test_a_model_that_returns_nan_is_an_error(judge: Judge, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    examples = [conversation(i) for i in range(3)]
    asker = Model(model, AutoTokenizer.from_pretrained(tiny_base), 1)
    losses = list(heldout_losses(asker, load_encoder(tiny_base), examples))
    rows = answers("base", chance(0.45, 2))
    for row, one in zip([row for row in rows if row["benchmark"] == "test"], losses, strict=True):
        row["item"] = one["item"]
    candidate = [row for row in answers("candidate", chance(0.7, 1)) if row["benchmark"] != "test"]
    rows += candidate + [{"model": "candidate", **row} for row in losses]
    verdict = judge(rows)
    assert verdict["verdict"] == "error"
    assert re.fullmatch(
        r"scores: 3 scores are not numbers, first: candidate, test/\S+: the loss is nan; the model is broken",
        verdict["reason"],
    )
