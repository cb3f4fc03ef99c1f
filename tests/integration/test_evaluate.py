"""The evaluate stage on a small random model: every kind of benchmark, the cache, broken models."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nightshift.core.errors import DataError
from nightshift.core.files import (
    file_digest,
    jsonl,
    read_json,
    read_rows,
    write_json,
    write_rows,
    write_text,
)
from nightshift.core.paths import MODEL
from nightshift.core.state import state_dir
from nightshift.data.benchmarks import CHOICE_TASK, read_benchmarks
from nightshift.data.clusters import CLUSTERS_SCHEMA
from nightshift.data.encode import load_encoder
from nightshift.data.schemas import AUGMENTED, GROUPED, SCORES
from tasks.evaluate import EvaluateParams, ExactMatchParams, jobs
from tasks.evaluate import __main__ as evaluate
from tasks.evaluate.answers import Answers, choose_answers
from tasks.evaluate.gpus import size_of
from tasks.evaluate.kinds import score_answers, score_benchmark
from tasks.evaluate.model import Model, load_model
from tasks.evaluate.scores import Part
from tasks.snapshot.sources.harness import harness_items
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import conversation

CHOICES = ["It is made of iron.", "Tin.", "It is gold.", "Nobody knows what it is made of at all."]
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "facts": (CHOICE_TASK, {"question": "What is it made of, number {i}?", "choices": CHOICES, "answer": 2}),
    "written": (
        {"kind": "generation", "metric": "token_f1", "max_new_tokens": 3},
        {"question": "Say the number {i}.", "references": ["the number {i}", "{i}"]},
    ),
    "reworded": (
        {"kind": "invariance"},
        {"question": "What is {i}?", "variants": ["Tell me: what is {i}?", "{i}?"], "choices": CHOICES},
    ),
    "changed": (
        {"kind": "direction"},
        {
            "question": "What is {i}?",
            "changed": "What is {i}? It is gold.",
            "choices": CHOICES,
            "answer": 2,
            "expect": "higher",
        },
    ),
}


def put_benchmarks(root: Path, items: int = 3) -> None:
    for name, (task, item) in TASKS.items():
        text = json.dumps(item)
        rows = [{**json.loads(text.replace("{i}", str(i))), "id": f"{name}/{i}"} for i in range(items)]
        write_text(root / name / "items.jsonl", jsonl(rows))
        write_text(root / name / "task.yaml", yaml.safe_dump(task))


def scoring(**changes: Any) -> EvaluateParams:
    """Return the parameters of a short evaluation."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["evaluate"]
    short = {"limit": 2, "batch_size": 4, "exact_match": None, "retrieval": None}
    return EvaluateParams(**{**params, **short, **changes})


@pytest.fixture
def model(tiny_base: Path, tokenizer: Any) -> Callable[..., Model]:
    def load(**options: Any) -> Model:
        return Model(load_model(str(tiny_base), None), tokenizer, 3, **options)

    return load


@pytest.fixture
def folder(in_tmp: Path, tiny_base: Path) -> Path:
    """Create all inputs of the stage; the candidate is the base with a changed last layer."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["evaluate"] |= {
        "limit": 2,
        "batch_size": 4,
        "exact_match": None,
        "retrieval": {"documents": 2, "benchmarks": ["facts", "written"]},
    }
    (in_tmp / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    shutil.copytree(tiny_base, evaluate.BASE)
    write_json(evaluate.BASE_RECORD, {"files": {}})
    candidate = load_model(str(tiny_base), None)
    candidate.model.layers[1].mlp.down_proj.weight.data *= 2
    candidate.save_pretrained(MODEL)
    write_json(evaluate.CHAMPION_RECORD, {"version": None, "arrival": None, "best": {}})
    write_rows(evaluate.BEST, [], SCORES)
    write_rows(evaluate.CLUSTERS, [], CLUSTERS_SCHEMA)
    write_rows(evaluate.TEST, [conversation(i) for i in range(3)], GROUPED)
    more = {"parent_id": None, "style": None, "ordinal": None}
    write_rows(evaluate.CLEAN_TRAIN, [{**conversation(i), **more} for i in range(3, 9)], AUGMENTED)
    put_benchmarks(evaluate.BENCHMARKS)
    return in_tmp


def test_every_item_of_every_kind_has_a_row_and_a_second_run_scores_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate.main()
    rows = read_rows(evaluate.SCORES)
    counts = {
        model: sorted(row["benchmark"] for row in rows if row["model"] == model)
        for model in ("base", "candidate", "retrieval")
    }
    everything = sorted([*[name for name in TASKS for _ in range(2)], *["test"] * 3])
    assert counts == {
        "base": everything,
        "candidate": everything,
        "retrieval": ["facts"] * 2 + ["written"] * 2,
    }
    assert {row["status"] for row in rows} == {"ok"}
    facts = next(row for row in rows if row["benchmark"] == "facts")
    assert (facts["item"], facts["slice"], facts["choices"]) == ("facts/0", "facts", 4)
    assert facts["question"] == "What is it made of, number 0?"
    assert (facts["expected"], facts["answer"] in CHOICES) == ("It is gold.", True)
    assert facts["score"] == float(facts["answer"] == facts["expected"])
    assert all(row["answer"] is None for row in rows if row["benchmark"] == "test")
    found = read_json(evaluate.METRICS)
    assert found["base"]["test"]["loss"] != found["candidate"]["test"]["loss"]
    assert found["base"]["test"]["perplexity"] == pytest.approx(
        math.exp(found["base"]["test"]["loss"]), rel=1e-3
    )
    assert sorted(read_json(evaluate.MODELS)) == ["base", "candidate"]
    # A champion that is bit-identical to the candidate already has scores.
    shutil.copytree(MODEL, evaluate.CHAMPION / "model")
    printed = capfd.readouterr().out
    # Two items of each of four benchmarks and three test examples, for two models, and 4 with retrieval. All
    # processes share each of the 12 benchmarks of models.
    steps = [line.split()[1] for line in printed.splitlines() if line.startswith("step ")]
    assert len(steps) == 12 * len(jobs.find_places_for([]))
    assert steps[-1] == "26/26"
    assert "%|" not in printed

    write_json(evaluate.CHAMPION_RECORD, {"version": 1, "base": {"files": {}}, "arrival": None, "best": {}})
    evaluate.main()
    assert capfd.readouterr().out == ""
    digests = read_json(evaluate.MODELS)
    assert digests["champion"] == digests["candidate"]


def test_scores_have_their_cluster_the_age_of_the_example_and_the_best_champion_so_far(folder: Path) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["evaluate"] |= {"retrieval": None}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    examples = [{**conversation(i), "arrival": i + 1} for i in range(3)]
    write_rows(evaluate.TEST, examples, GROUPED)
    clusters = [{"benchmark": "facts", "item": f"facts/{i}", "cluster": "gold"} for i in range(2)]
    write_rows(evaluate.CLUSTERS, clusters, CLUSTERS_SCHEMA)
    shutil.copytree(MODEL, evaluate.CHAMPION / "model")
    task = file_digest(evaluate.BENCHMARKS / "facts" / "task.yaml")
    best = {"facts": {"version": 2, "task": task}, "written": {"version": 2, "task": "another"}}
    best |= {"test": {"version": 1, "task": None}, "gone": {"version": 1, "task": "x"}}
    champion = {"version": 3, "base": {"files": {}}, "arrival": 2, "best": best}
    write_json(evaluate.CHAMPION_RECORD, champion)
    evaluate.main()
    rows = [row for row in read_rows(evaluate.SCORES) if row["model"] == "candidate"]
    known = {(row["benchmark"], row["item"]): row for row in rows}
    kept = {key: {**row, "score": 0.25} for key, row in known.items()}
    for example in examples:
        # A lineage has no text of test examples.
        kept["test", example["id"]] |= {"question": None, "expected": None}
    kept["facts", "facts/1"]["question"] = "Asked in other words"
    kept["gone", "1"] = {**kept["facts", "facts/0"], "benchmark": "gone"}
    write_rows(evaluate.BEST, kept.values(), SCORES)
    evaluate.main()
    rows = read_rows(evaluate.SCORES)
    facts = [row for row in rows if row["benchmark"] == "facts"]
    # Also item 0 of the best champion; its item 1 had another question, and `written` another task.
    assert {row["cluster"] for row in facts} == {"gold"}
    found = [(row["benchmark"], row["item"], row["score"]) for row in rows if row["model"] == "best"]
    assert sorted(found) == [
        ("facts", "facts/0", 0.25),
        *sorted(("test", example["id"], 0.25) for example in examples),
    ]
    is_new = {row["item"]: row["is_new"] for row in rows if row["benchmark"] == "test"}
    assert is_new == {examples[0]["id"]: False, examples[1]["id"]: False, examples[2]["id"]: True}
    assert {row["is_new"] for row in facts} == {None}
    assert {row["cluster"] for row in rows if row["benchmark"] != "facts"} == {None}


def evaluated(adapter: Path | None, *benchmarks: str) -> evaluate.EvaluatedModel:
    """Return a model to evaluate on the folder's base."""
    return evaluate.EvaluatedModel(evaluate.BASE, "digest", adapter, 0, list(benchmarks))


def test_scores_are_keyed_by_everything_that_affects_them_and_nothing_else(folder: Path) -> None:
    params = scoring()
    base, candidate = (evaluated(adapter, *TASKS) for adapter in (None, MODEL))
    kept = evaluate.memo_files(base, params)
    assert evaluate.memo_files(base, params.model_copy(update={"batch_size": 1})) == kept
    others = [
        evaluate.memo_files(candidate, params),
        evaluate.memo_files(replace(base, documents=2), params),
        evaluate.memo_files(base, params.model_copy(update={"limit": 1})),
        evaluate.memo_files(replace(base, base_digest="another"), params),
    ]
    assert len({file for one in (kept, *others) for file in one.values()}) == 20
    put_benchmarks(evaluate.BENCHMARKS, items=4)
    shutil.rmtree(evaluate.BENCHMARKS / "written")
    changed = evaluate.memo_files(evaluated(None, "facts"), params)
    assert changed["facts"] != kept["facts"]


def test_a_killed_stage_keeps_finished_benchmarks(folder: Path) -> None:
    params = scoring(limit=None)
    # The second benchmark takes long enough to be interrupted.
    put_benchmarks(evaluate.BENCHMARKS, items=500)
    item = (evaluate.BENCHMARKS / "facts" / "items.jsonl").read_text().splitlines()[0]
    write_text(evaluate.BENCHMARKS / "facts" / "items.jsonl", item)
    one = evaluated(None, "facts", "reworded")
    files = evaluate.memo_files(one, params)
    targets = {"base": {name: str(file) for name, file in files.items()}}
    job = jobs.build_job({"base": one}, targets, params)

    def interrupt(line: str) -> None:
        if line.startswith("scored base facts"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(job, {}, interrupt)
    assert [row["item"] for row in read_rows(files["facts"])] == ["facts/0"]
    assert not files["reworded"].is_file()


def test_any_number_of_processes_gives_the_same_rows_and_goes_on_after_a_killed_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_benchmarks(evaluate.BENCHMARKS, items=5)
    text = Path("params.yaml").read_text(encoding="utf-8")
    write_text(Path("params.yaml"), text.replace("limit: 2", "limit: 5"))
    rows = []
    for processes in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda found=processes: found)
        evaluate.main()
        rows.append(read_rows(evaluate.SCORES))
        files = sorted((state_dir() / "memo" / "scores").iterdir())
        # One for each benchmark of a model: the parts are joined.
        assert len(files) == 12
        if processes == 1:
            shutil.rmtree(files[0].parent)
    for one, other in zip(*rows, strict=True):
        assert {**one, "score": None} == {**other, "score": None}
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
    for name, count in (("base", 5), ("retrieval", 0)):
        assert sum(row["written"] is not None for row in rows[1] if row["model"] == name) == count

    model, benchmark = evaluate.find_models(scoring())["base"], "facts"
    target = evaluate.memo_files(model, scoring(limit=5))[benchmark]
    kept = [{**row, "answer": "kept"} for row in read_rows(target)]
    target.unlink()
    write_rows(Part(1, 3).file(target), kept[1::3], SCORES)
    evaluate.main()
    answers = [row["answer"] == "kept" for row in read_rows(target)]
    assert answers == [False, True, False, False, True]


def test_as_many_processes_score_on_a_cpu_as_hold_the_largest_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = list(evaluate.find_models(scoring()).values())
    size = max(sum(size_of(one) for one in {model.weights, model.lora or model.weights}) for model in models)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(jobs, "device", lambda: "cpu")
    found = []
    for copies in (0.5, 1.3, 2.5, 9.0):
        monkeypatch.setattr(jobs, "available_memory", lambda room=copies * size: int(room))
        found.append([place["OMP_NUM_THREADS"] for place in jobs.find_places_for(models)])
    assert found == [["16"], ["16"], ["8", "8"], ["4", "4", "4", "4"]]
    monkeypatch.setattr(jobs, "device", lambda: "cpu, float32")
    assert len(jobs.find_places_for(models)) == 3


def test_choices_that_share_a_prompt_have_the_same_likelihoods_as_scored_separately(
    model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = model()
    asked = [(f"What is {'very ' * i}it?", CHOICES[: 2 + i % 3]) for i in range(5)]
    found = shared.choice_likelihoods(asked)
    monkeypatch.setattr("tasks.evaluate.model.keeps_all", lambda _: False)
    expected = shared.choice_likelihoods(asked)
    assert [len(one) for one in found] == [2, 3, 4, 2, 3]
    for likelihoods, alone in zip(found, expected, strict=True):
        assert likelihoods == pytest.approx(alone, abs=1e-3)


def test_direction_and_invariance_follow_from_the_likelihoods(
    model: Callable[..., Model], tmp_path: Path
) -> None:
    put_benchmarks(tmp_path)
    asker = model()
    rows = {
        one.name: list(score_benchmark(asker, one, tmp_path / one.name, None))
        for one in read_benchmarks(tmp_path)
    }
    for row, i in zip(rows["changed"], range(3), strict=True):
        before, after = asker.choice_likelihoods(
            [(f"What is {i}?", CHOICES), (f"What is {i}? It is gold.", CHOICES)]
        )
        odds = [math.exp(one[2]) / sum(math.exp(x) for x in one) for one in (before, after)]
        assert row["score"] == float(odds[1] > odds[0])
        assert row["answer"] == f"{odds[0]:.4f} -> {odds[1]:.4f}"
    for row, i in zip(rows["reworded"], range(3), strict=True):
        wordings = [f"What is {i}?", f"Tell me: what is {i}?", f"{i}?"]
        found = asker.choice_likelihoods([(text, CHOICES) for text in wordings])
        assert row["score"] == float(len({one.index(max(one)) for one in found}) == 1)


def test_a_broken_model_gives_errors_and_a_short_context_skips(
    model: Callable[..., Model], tmp_path: Path
) -> None:
    put_benchmarks(tmp_path, 1)
    broken, short = model(), model()
    broken.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    short._max_length = 20
    for benchmark in read_benchmarks(tmp_path):
        (row,) = score_benchmark(short, benchmark, tmp_path / benchmark.name, None)
        assert (row["status"], row["score"]) == ("skipped", None), benchmark.name
        assert row["answer"] == "longer than the model's context of 20 tokens"
        if benchmark.kind != "generation":
            (row,) = score_benchmark(broken, benchmark, tmp_path / benchmark.name, None)
            assert (row["status"], row["score"]) == ("error", None), benchmark.name
            assert row["answer"] == "a log-likelihood is not a number"


def test_documents_are_added_only_to_the_last_question(model: Callable[..., Model]) -> None:
    looks_up = model(find=lambda question: [f"A note on {question}"])
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    text = looks_up.apply_chat_template(turns)
    assert text.count("A note on") == 1
    assert "Answer with the help of these notes.\n\nA note on Two?\n\nTwo?" in text
    assert "A note on" not in model().apply_chat_template(turns)


@pytest.mark.usefixtures("folder")
def test_a_baseline_on_a_benchmark_that_is_gone_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = {"documents": 1, "benchmarks": ["gone"]}
    params = scoring(retrieval=gone)
    assert sorted(evaluate.find_models(params)) == ["base", "candidate"]
    assert caplog.messages == ["ignored: evaluate.retrieval.benchmarks lists gone, which is no benchmark"]
    both = {"documents": 1, "benchmarks": ["facts", "gone"]}
    params = scoring(retrieval=both)
    assert evaluate.find_models(params)["retrieval"].benchmarks == ["facts"]


def put_examples(*conversations: list[tuple[str, str]]) -> None:
    """Write test examples, each of (role, content) turns."""
    turn = {"tool_calls": None, "name": None}
    rows = [
        {**conversation(i), "messages": [{"role": role, "content": text, **turn} for role, text in turns]}
        for i, turns in enumerate(conversations)
    ]
    write_rows(evaluate.TEST, rows, GROUPED)


@pytest.mark.usefixtures("folder")
def test_the_last_answer_of_a_test_example_is_generated_after_all_turns_before(
    model: Callable[..., Model],
) -> None:
    chat = [("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    asker = model()
    turns = [{"role": role, "content": text} for role, text in chat]
    (spoken,) = asker.generate_greedy([asker.apply_chat_template(turns)], 9)
    put_examples(
        [("user", "Zero?"), ("assistant", "Yes.")],
        [*chat, ("assistant", "No.")],
        [("user", "Three?"), ("assistant", "word " * 50)],
        [("text", "A plain text.")],
    )
    shutil.rmtree(evaluate.BENCHMARKS)
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    params["evaluate"] |= {
        "exact_match": {"max_new_tokens": 9, "limit": None},
        "retrieval": {"documents": 1, "benchmarks": ["test_answers"]},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    evaluate.main()
    rows = [row for row in read_rows(evaluate.SCORES) if row["benchmark"] == "test_answers"]
    assert {(row["model"], row["item"]) for row in rows} == {
        (name, item) for name in ("base", "candidate", "retrieval") for item in ("0", "1")
    }
    (row,) = (row for row in rows if (row["model"], row["item"]) == ("base", "1"))
    assert row == {
        "model": "base",
        "benchmark": "test_answers",
        "item": "1",
        "slice": "1",
        "score": 0.0,
        "tokens": None,
        "choices": None,
        "written": None,
        "status": "ok",
        "question": "Two?",
        "expected": "No.",
        "answer": spoken,
        "cluster": None,
        # There is no champion.
        "is_new": True,
        "paraphrase_of": None,
    }
    summary = read_json(Path("data/evaluate/summary.json"))
    assert summary["test_answers"] == {"test": 4, "asked": 2, "no_text_answer": 1, "too_long": 1}
    assert read_json(evaluate.METRICS)["base"]["test_answers"]["items"] == 2


@pytest.mark.usefixtures("folder")
def test_answers_are_compared_without_case_and_punctuation_and_unreadable_examples_are_skipped(
    model: Callable[..., Model],
) -> None:
    put_examples(
        [("user", "Warm?"), ("tool", "20 degrees"), ("assistant", "The YES!")],
        [("user", "Cold?"), ("assistant", "No.")],
    )
    encoder = load_encoder(evaluate.BASE)
    answers = Answers(["0", "1"], 2, {})
    asked: list[str] = []
    asker = model()
    asker.generate_greedy = lambda prompts, _: asked.extend(prompts) or ["yes"] * len(prompts)  # type: ignore
    first, second = score_answers(asker, encoder, evaluate.TEST, answers)
    assert (first["score"], first["question"], second["score"]) == (1.0, "20 degrees", 0.0)
    assert asked[0].endswith("20 degrees<|im_end|>\n<|im_start|>assistant\n")
    fails = "{% for turn in messages if turn.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}"
    assert encoder.template
    source = fails + encoder.template.source
    broken = replace(encoder, template=replace(encoder.template, source=source))
    first, second = score_answers(asker, broken, evaluate.TEST, answers)
    assert (first["status"], first["score"], first["expected"]) == ("skipped", None, "The YES!")
    assert first["answer"] == "the chat template does not render it"
    assert (second["status"], second["score"]) == ("ok", 0.0)


@pytest.mark.usefixtures("folder")
def test_answers_are_chosen_by_length_and_limit_and_keyed_by_them(caplog: pytest.LogCaptureFixture) -> None:
    write_rows(evaluate.TEST, [conversation(i) for i in range(9)], GROUPED)
    base = evaluated(None, "test_answers")
    params = scoring()

    def choose(max_new_tokens: int, limit: int | None) -> Answers:
        how = ExactMatchParams(max_new_tokens=max_new_tokens, limit=limit)
        return choose_answers(evaluate.TEST, evaluate.BASE, how)

    every, some = choose(20, None), choose(20, 3)
    assert sorted(every.ids) == [str(i) for i in range(9)]
    assert every.ids[:3] == some.ids
    assert some.counts == {"test": 9, "asked": 3, "over_limit": 6}
    files = {evaluate.memo_files(base, params, one)["test_answers"] for one in (every, some, choose(21, 3))}
    assert len(files) == 3
    # Another example takes the place of one at most.
    write_rows(evaluate.TEST, [conversation(i) for i in range(10)], GROUPED)
    assert len({*choose(20, 3).ids, *some.ids}) <= 4
    assert caplog.messages == []
    none = choose(2, None)
    assert none.counts == {"test": 10, "asked": 0, "too_long": 10}
    assert caplog.messages == [
        "evaluate.exact_match: none of 10 test examples can be asked (too_long 10); raise max_new_tokens"
    ]
    assert "test_answers" not in evaluate.find_models(params, none)["base"].benchmarks


def test_an_lm_eval_task_is_converted_to_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"q": "Is it cold?", "label": 1}, {"q": "Is it hot?", "label": 0}]
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    task = {
        "task": "weather",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "label",
    }
    (tmp_path / "weather.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "away.yaml").write_text(
        yaml.safe_dump({**task, "task": "away", "dataset_path": "nobody/nothing", "dataset_kwargs": {}})
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert next(harness_items("weather", manager)) == {
        "id": "weather/0",
        "slice": "weather",
        "question": "Question: Is it cold?\nAnswer:",
        "choices": ["no", "yes"],
        "answer": 1,
    }
    with pytest.raises(DataError, match="lm-eval has no task 'wether'"):
        list(harness_items("wether", manager))
    with pytest.raises(
        DataError, match=r"lm-eval:away: its data cannot be downloaded .*unset HF_HUB_OFFLINE"
    ):
        list(harness_items("away", manager))


def test_a_cpu_without_bf16_scores_in_float32_and_these_scores_are_kept_apart(
    folder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(str(tiny_base), None).to(torch.bfloat16).save_pretrained(folder / "half")
    params = scoring()
    files = []
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for module in ("jobs", "model"):
            monkeypatch.setattr(f"tasks.evaluate.{module}.cpu_has_bf16", lambda has=has_bf16: has)
        assert load_model(str(folder / "half"), None).dtype == dtype
        files.append(evaluate.memo_files(evaluated(None, "facts"), params)["facts"])
    assert files[0] != files[1]


def test_a_sample_of_choices_is_answered_in_writing_as_in_use(
    model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_benchmarks(tmp_path, 40)
    (facts,) = (one for one in read_benchmarks(tmp_path) if one.name == "facts")
    asker = model()
    asker._prefix = "<think></think>"
    prompts: list[str] = []

    def write(asked: list[str], max_new_tokens: int) -> list[str | None]:
        prompts.extend(asked)
        assert max_new_tokens == 24
        return ["It is gold. Of course.", "It is tin.", *[None] * (len(asked) - 2)]

    monkeypatch.setattr(asker, "generate_greedy", write)
    rows = list(score_benchmark(asker, facts, tmp_path / "facts", None))
    # 16 of the 40 questions, spread evenly; the right choice is always gold.
    assert len(prompts) == 16
    assert not any("<think>" in prompt for prompt in prompts)
    written = {row["item"]: row["written"] for row in rows if row["written"] is not None}
    assert written == {"facts/0": 1.0, "facts/2": 0.0}
