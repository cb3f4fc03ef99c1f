"""A small handmade checkout after a nightly run: files of every stage, MLflow run and registry."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from mlflow import MlflowClient

from nightshift.core.files import file_digest, jsonl, write_figures, write_json, write_rows, write_text
from nightshift.data.schemas import ALL_SCORES, AUGMENTED, GROUPED, MESSAGES
from nightshift.registry import versions
from nightshift.registry.lineage import write_lineage
from nightshift.tracking.runs import experiment_id
from tasks.decontaminate.hits import HITS_SCHEMA
from tasks.evaluate.scores import metrics
from tasks.pack import ROWS
from tests.helpers.checkouts import ROOT

REJECTED = pa.schema(
    [
        ("parent_id", pa.string()),
        ("style", pa.string()),
        ("reason", pa.string()),
        ("messages", MESSAGES),
        ("source_similarity", pa.float64()),
    ]
)
SIMILARITY = pa.schema([("id", pa.string()), ("source_similarity", pa.float64())])
# Causes a console error and a request if a browser interprets it as anything but text.
HOSTILE = '<script>document.title = "taken"</script><img src="http://127.0.0.1:9/x.png" onerror="alert(1)">'
SUMMARIES: dict[str, dict[str, Any]] = {
    "snapshot": {},
    "base": {},
    "ingest": {
        "rows_in": 12,
        "rows_out": 10,
        "dropped": {"malformed_json": 2},
        "dropped_by_source": {"facts": {"malformed_json": 2}},
        "pii": {"facts": {"email": 1}},
        "repaired": {"mojibake": 1},
        "ignored_columns": {"facts": {"rating_of_user": 4}},
    },
    "dedupe": {"rows_in": 10, "rows_out": 9, "dropped": {"near_duplicate": 1}},
    "split": {
        "rows_in": 9,
        "rows_out": 9,
        "rows_out_by_side": {"test": 2, "train": 6, "validation": 1},
    },
    "augment": {"rows_in": 6, "added": 1, "rows_out": 7, "wanted": 2, "rejected": {"name_changed": 1}},
    "decontaminate": {"rows_in": 7, "rows_out": 6, "dropped": {"same_question": 1}},
    "pack": {
        "rows_in": 6,
        "rows_out": 6,
        "packed_rows": 2,
        "packed_rows_bound": 2,
        "spans": 6,
        "tokens_out": 600,
        "tokens_supervised": 200,
        "tokens_dropped": {},
        "efficiency": 0.75,
    },
    "sft": {"rows_in": 2, "rows_out": 2, "steps": 3, "tokens": 600, "tokens_supervised": 200},
    "prefer": {},
    "evaluate": {},
    "gate": {},
}
GATE: dict[str, Any] = {
    "verdict": "promote",
    "reason": "gain: better: +30.0 points of accuracy",
    "reference": "champion",
    "candidate": "c" * 64,
    "checks": [
        {"name": "gain", "verdict": "promote", "message": "better: +30.0 points of accuracy"},
        {"name": "slices", "verdict": "promote", "message": "none of 2 significantly worse | by more than 5"},
    ],
    "gain": {
        "mean": 0.3,
        "low": 0.1,
        "high": 0.5,
        "alpha": 0.05,
        "level": 0.05 / 365,
        "power": 0.25,
        "items_needed": 150.0,
        "p_value": 0.0001,
        "p_value_of_loss": 1.0,
        "items": 10,
        "clusters": 10,
    },
    "slices": [
        {"name": "facts/even", "items": 5, "mean": 0.2, "p_value": 0.9, "is_worse": False},
        {"name": "facts/odd", "items": 5, "mean": 0.4, "p_value": 0.9, "is_worse": False},
    ],
}


def messages(question: str, answer: str) -> list[dict[str, Any]]:
    """Return a question and its answer."""
    turn = {"tool_calls": None, "name": None}
    return [
        {"role": "user", "content": question, **turn},
        {"role": "assistant", "content": answer, **turn},
    ]


def score(model: str, item: int, value: float | None, **more: Any) -> dict[str, Any]:
    """Return one row of the score table: a question with four choices."""
    return {
        "model": model,
        "benchmark": "facts",
        "item": f"q{item}",
        "slice": "odd" if item % 2 else "even",
        "score": value,
        "tokens": None,
        "choices": 4,
        "status": "ok",
        "question": f"What is {item}?",
        "expected": f"number {item}",
        "answer": f"{model} says {item}",
        **more,
    }


def heldout(model: str, item: str, loss: float, tokens: int) -> dict[str, Any]:
    """Return the row of a held-out example: a loss summed over its tokens, and no answer."""
    texts = {"question": None, "expected": None, "answer": None}
    example = {"benchmark": "test", "item": item, "slice": "facts", "tokens": tokens, "choices": None}
    example["is_new"] = item == "t2"
    return {**score(model, 0, loss), **texts, **example}


def night_scores() -> list[dict[str, Any]]:
    """Return scores of four models; correct of 10: candidate 8, champion 5, base 2, retrieval 6."""
    right = {"base": (0, 1), "champion": range(5), "candidate": range(1, 9), "retrieval": range(6)}
    rows = [score(model, i, float(i in known)) for model, known in right.items() for i in range(10)]
    losses = {"base": (12.0, 30.0), "champion": (10.0, 24.0), "candidate": (8.0, 25.0)}
    for model, (first, second) in losses.items():
        rows += [heldout(model, "t1", first, 4), heldout(model, "t2", second, 10)]
    return rows


def make_night(folder: Path, *, champion: bool = True) -> None:
    """Turn the current folder into a checkout after a night with the verdict promote.

    Args:
        folder: The current folder.
        champion: Whether version 1 is already champion; otherwise the gate compared with the base.
    """
    write_text(folder / "params.yaml", (ROOT / "params.yaml").read_text(encoding="utf-8"))
    write_text(folder / "dvc.yaml", (ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    write_text(folder / "dvc.lock", "{}")
    data = folder / "data"
    write_json(data / "raw" / "used.json", ["facts"])
    write_json(data / "start" / "start.json", {})
    for stage, more in SUMMARIES.items():
        write_json(
            data / stage / "summary.json", {"rows_in": 0, "added": 0, "rows_out": 0, "dropped": {}, **more}
        )
    write_json(data / "base" / "base.json", {"model": "tiny", "dtype": "float32", "files": {"a": "1" * 64}})
    write_json(data / "sft" / "plan.json", {"learning_rate": [0.0, 0.001, 0.0005]})
    effective = {
        "precision": {"requested": "auto", "effective": "bf16"},
        "trained": {"weights": 4884480, "tensors": 420, "modules": {"q_proj": 30}},
        "strategy_reason": "strategy: zero2",
    }
    write_json(data / "sft" / "effective.json", effective)
    write_json(data / "evaluate" / "models.json", {})
    repair = {"repair": "mojibake", "origin": "facts/000001.jsonl:3", "before": "CafÃ©", "after": HOSTILE}
    write_text(data / "ingest" / "repairs.jsonl", jsonl([repair]))
    hit = {"id": "h", "origin": "facts/000001.jsonl:9", "benchmark": "elements", "item": "q1"}
    hit |= {"reason": "same_question", "match": HOSTILE, "containment": 1.0}
    write_rows(data / "decontaminate" / "hits.parquet", [hit], HITS_SCHEMA)
    write_examples(data)
    write_mlflow(folder, champion=champion)
    write_scores(data, [row for row in night_scores() if champion or row["model"] != "champion"])
    write_json(data / "gate" / "gate.json", {**GATE, "reference": "champion" if champion else "base"})


def write_examples(data: Path) -> None:
    """Write six examples (one hostile), an accepted and a rejected paraphrase, two held-out examples."""
    example = {"tools": None, "source": "facts", "arrival": 1}
    original = {"parent_id": None, "style": None, "ordinal": None}
    rows = [
        {
            **example,
            **original,
            "id": f"e{i}",
            "group_id": f"e{i}",
            "origin": f"facts/000001.jsonl:{i}",
            "messages": messages(f"Ask {i}", HOSTILE if i == 1 else f"Answer {i}"),
        }
        for i in range(1, 7)
    ]
    child = {"id": "p1", "parent_id": "e1", "style": "reword", "ordinal": 1}
    paraphrase = {**rows[0], **child, "messages": messages("Say it again", HOSTILE)}
    write_rows(data / "augment" / "train.parquet", [*rows, paraphrase], AUGMENTED)
    write_rows(data / "augment" / "scores.parquet", [{"id": "p1", "source_similarity": 0.25}], SIMILARITY)
    rejected = {"parent_id": "e2", "style": "reword", "reason": "name_changed", "source_similarity": 0.5}
    write_rows(
        data / "augment" / "rejected.parquet",
        [{**rejected, "messages": messages("Ask two", "Answer too")}],
        REJECTED,
    )
    test = [{**rows[0], "id": one, "messages": messages(f"Held {one}", f"Out {one}")} for one in ("t1", "t2")]
    write_rows(data / "split" / "test.parquet", test, GROUPED)


def write_packed(data: Path, ids: list[str], shards: list[str]) -> None:
    """Write the packed examples, all from the last shard, and the digests of the existing shards."""
    row = {"input_ids": [1], "labels": [1], "seq_lengths": [1] * len(ids), "starts": [0] * len(ids)}
    origins = [f"{shards[-1]}:{one}" for one in ids]
    write_rows(data / "pack" / "train.parquet", [{**row, "example_ids": ids, "origins": origins}], ROWS)
    write_json(data / "raw" / "digests.json", {name: file_digest(ROOT / "dvc.yaml") for name in shards})


def write_mlflow(folder: Path, *, champion: bool) -> None:
    """Write the training run and the registry: the champion, if any, then the candidate."""
    client, name = versions.open_registry()
    run = client.create_run(experiment_id(client)).info.run_id
    for step, (loss, rate) in enumerate([(3.0, 0.0), (2.5, 0.001), (2.0, 0.0005)], start=1):
        client.log_metric(run, "loss", loss, step=step)
        client.log_metric(run, "learning_rate", rate, step=step)
    client.log_metric(run, "eval_loss", 2.2, step=3)
    data = folder / "data"
    speed = {"tokens_per_second": 350.0, "cpu_shares": [0.97, 0.52]}
    write_json(data / "sft" / "mlflow_run.json", {"run_id": run, **speed})
    write_json(data / "gate" / "gate.json", GATE)
    client.create_registered_model(name)
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    if champion:
        # The champion used another learning rate, five of the examples and one that is gone.
        (folder / "params.yaml").write_text(params.replace("1.0e-3", "2.0e-3"), encoding="utf-8")
        write_packed(data, ["e1", "e2", "e3", "e4", "e5", "gone"], ["facts/000001.jsonl"])
        write_json(data / "champion" / "champion.json", {"version": None, "best": {}})
        write_rows(data / "evaluate" / "scores.parquet", [], ALL_SCORES)
        write_lineage(folder / "versions" / "1" / "artifacts" / "lineage")
        (folder / "params.yaml").write_text(params, encoding="utf-8")
        write_version(client, name, folder, "b" * 64)
    trained = ["e1", "e2", "e3", "e4", "e5", "e6", "p1"]
    write_packed(data, trained, ["facts/000001.jsonl", "facts/000002.jsonl"])
    write_version(client, name, folder, "c" * 64)
    version = 1 if champion else None
    write_json(
        data / "champion" / "champion.json",
        {"version": version, "digest": "b" * 64, "arrival": version, "best": {}},
    )


def write_version(client: MlflowClient, name: str, folder: Path, digest: str) -> None:
    """Register a version and make it champion."""
    number = len(versions.registered(client, name)) + 1
    source = folder / "versions" / str(number)
    source.mkdir(parents=True, exist_ok=True)
    client.create_model_version(name, str(source), tags={versions.DIGEST: digest})
    client.set_registered_model_alias(name, "champion", str(number))


def write_scores(data: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(data / "evaluate" / "scores.parquet", rows, ALL_SCORES)
    write_figures(data / "evaluate" / "metrics.json", metrics(rows))
