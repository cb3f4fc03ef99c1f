"""A data stage fails instead of silently emptying a dataset or dropping a whole source.

The stages run in sequence, with the shipped limits, on rows generated here.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.errors import DataError
from nightshift.core.files import jsonl, read_json, read_rows, write_text
from nightshift.data.benchmarks import CHOICE_TASK
from tests.helpers.byte_base import make_byte_base
from tests.helpers.checkouts import ROOT

STAGES = ("ingest", "dedupe", "split", "augment", "decontaminate", "pack")
WORDS = [f"word{number}" for number in range(4000)]
Row = dict[str, Any]
Run = Callable[..., dict[str, Any]]


def chat(*contents: str) -> Row:
    """Return a conversation with alternating user and assistant turns."""
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    }


def texts(count: int, size: int = 12, seed: int = 0) -> list[str]:
    """Return distinct random texts."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=size)) for _ in range(count)]


def distinct(count: int, seed: int = 0) -> list[Row]:
    """Return distinct random conversations."""
    questions, answers = texts(count, seed=seed), texts(count, seed=seed + 1000)
    return [chat(question, answer) for question, answer in zip(questions, answers, strict=True)]


def unreadable(count: int) -> list[Row]:
    """Return rows without an answer."""
    return [{"question": text} for text in texts(count)]


def templated(count: int) -> list[Row]:
    """Return distinct short questions behind one long shared context."""
    (context,) = texts(1, size=200, seed=5)
    return [chat(f"{context} {question}", "yes") for question in texts(count, size=4, seed=6)]


def edited(row: Row) -> Row:
    """Return the conversation with a changed answer."""
    first, answer = (turn["content"] for turn in row["messages"])
    return chat(first, answer + " edited")


def with_system(prompt: str, row: Row) -> Row:
    """Return the conversation behind a system prompt."""
    return {"messages": [{"role": "system", "content": prompt}, *row["messages"]]}


@pytest.fixture
def run(in_tmp: Path) -> Run:
    """Return a function that runs the stages up to `last` on shards in arrival order."""
    make_byte_base(in_tmp / "data/base/model")
    (in_tmp / "data/benchmarks").mkdir(parents=True)

    def run_stages(
        last: str, shards: Sequence[tuple[str, Sequence[Row]]], changes: dict[str, Row] | None = None
    ) -> dict[str, Any]:
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        own = {"split": {"by_phrasing": []}, "augment": {"sources": []}, "pack": {"max_length": 4096}}
        for changed in (own, changes or {}):
            for section, values in changed.items():
                params[section] |= values
        (in_tmp / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        for number, (source, rows) in enumerate(shards, start=1):
            path = in_tmp / f"data/raw/{source}/{number:06}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(jsonl(rows), encoding="utf-8")
        for stage in STAGES[: STAGES.index(last) + 1]:
            name = f"tasks.{stage}" if stage == "split" else f"tasks.{stage}.__main__"
            import_module(name).main()
        summary: dict[str, Any] = read_json(in_tmp / f"data/{last}/summary.json")
        return summary

    return run_stages


def test_an_unreadable_source_fails_ingest(run: Run) -> None:
    with pytest.raises(DataError) as caught:
        run("ingest", [("good", distinct(1000)), ("bad", unreadable(50))])
    first, *shown = str(caught.value).splitlines()
    assert first == (
        "data/ingest/quarantine.jsonl: 50 of 50 rows of bad are dropped (no_answer 50), more "
        "than ingest.max_drop_rate=0.05; fix the rows in their file and run `nightshift snapshot` (bad rows "
        "of its older version no longer count), remove the source from snapshot.sources, or raise the limit"
    )
    assert shown[0].startswith("  data/raw/bad/000002.jsonl:1: no_answer; add the answer, or name its column")
    assert len(shown) == 5
    assert not Path("data/ingest/examples.parquet").exists()


def test_an_unreadable_source_with_few_rows_fails_ingest_too(run: Run) -> None:
    with pytest.raises(DataError, match=r"2 of 2 rows of bad are dropped \(no_answer 2\)"):
        run("ingest", [("good", distinct(1000)), ("bad", unreadable(2))])


def test_some_bad_rows_of_a_small_source_and_an_empty_file_are_accepted(run: Run) -> None:
    small = [*distinct(5, seed=7), *unreadable(2)]
    summary = run("ingest", [("good", distinct(1000)), ("small", small), ("later", [])])
    assert summary["dropped_by_source"] == {"later": {"empty_file": 1}, "small": {"no_answer": 2}}


def test_chats_with_one_long_system_prompt_stay_and_their_copies_go(run: Run) -> None:
    (prompt,) = texts(1, size=450, seed=5)
    rows = distinct(1000)
    rows += [edited(row) for row in rows[:50]]
    summary = run("dedupe", [("chats", [with_system(prompt, row) for row in rows])])
    assert (summary["rows_out"], summary["dropped"]) == (1000, {"near_duplicate": 50})
    removed = read_rows(Path("data/dedupe/removed.parquet"))
    kept = {row["id"]: row["origin"] for row in read_rows(Path("data/ingest/examples.parquet"))}
    pairs = [(kept[row["kept_id"]], kept[row["id"]]) for row in removed]
    name = "chats/000001.jsonl"
    assert pairs == [(f"{name}:{line}", f"{name}:{1000 + line}") for line in range(1, 51)]


def test_a_system_prompt_that_names_the_user_is_a_template_too(run: Run) -> None:
    (prompt,) = texts(1, size=300, seed=5)
    rows = [
        with_system(f"{prompt[:400]} user{number} {prompt[400:]}", row)
        for number, row in enumerate(distinct(200))
    ]
    assert run("dedupe", [("chats", rows)])["rows_out"] == 200


def test_what_differs_only_in_symbols_stays(run: Run) -> None:
    """abs(-5) is not abs(5), and 7 + 3 is not 7 * 3."""
    rows = [chat(f"What is {number} {sign} 3?", "ten") for number in (7, 9) for sign in "+*/%&|<>=~^$@-"]
    rows += [chat(f"What is abs({sign}5)?", "5") for sign in ("", "-")]
    rows += [chat(f"Is {name} a language?", "Yes.") for name in ("C", "C++", "C#", "F#")]
    summary = run("dedupe", [("signs", rows)])
    assert (summary["rows_out"], summary["dropped"]) == (34, {})


def test_what_differs_only_in_punctuation_is_merged(run: Run) -> None:
    rows = [chat(f"What is seven{mark}", "seven") for mark in ("?", "!", ".", ";", ":", ",", "...")]
    summary = run("dedupe", [("signs", rows)])
    assert (summary["rows_out"], summary["dropped"]) == (1, {"normalized_duplicate": 6})


@pytest.mark.parametrize("answers", ["yes", "own"])
def test_questions_about_one_long_document_stay(run: Run, answers: str) -> None:
    rag = templated(100)
    if answers == "own":
        rag = [chat(row["messages"][0]["content"], text) for row, text in zip(rag, texts(100), strict=True)]
    summary = run("dedupe", [("good", distinct(1000)), ("rag", rag)])
    assert summary["rows_out_by_source"] == {"good": 1000, "rag": 100}


def test_five_questions_about_each_of_many_documents_stay(run: Run) -> None:
    documents, questions, answers = texts(40, size=250, seed=1), texts(200, 8, seed=2), texts(200, 6, seed=3)
    rows = [
        chat(f"{documents[i // 5]}\n\n{question}", answer)
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    assert run("dedupe", [("rag", rows)])["rows_out"] == 200


def test_one_classification_template_with_two_labels_stays(run: Run) -> None:
    """The template stands before, around and after what is classified."""
    before, after = texts(2, size=60, seed=5)
    rows = [
        chat(f"{before} {text} {after}", ("positive", "negative")[i % 2])
        for i, text in enumerate(texts(300, size=5, seed=6))
    ]
    assert run("dedupe", [("labels", rows)])["rows_out"] == 300


def test_one_refusal_of_many_questions_stays(run: Run) -> None:
    (refusal,) = texts(1, size=80, seed=5)
    rows = [chat(question, refusal) for question in texts(200, size=9, seed=6)]
    assert run("dedupe", [("refusals", rows)])["rows_out"] == 200


@pytest.mark.parametrize("size", [5, 1])
def test_questions_about_one_document_that_arrive_night_by_night_stay(run: Run, size: int) -> None:
    rag = templated(30)
    nights = [("rag", rag[start : start + size]) for start in range(0, 30, size)]
    summary = run("dedupe", [("good", distinct(1000)), *nights])
    assert summary["rows_out_by_source"]["rag"] == 30


def test_copies_of_one_chat_are_no_template(run: Run) -> None:
    """Thirty versions of one answer to one question: the first stays."""
    (question,), (answer,) = texts(1, size=12, seed=5), texts(1, size=80, seed=6)
    words = answer.split()
    copies = [chat(question, " ".join([*words[:i], f"new{i}", *words[i + 1 :]])) for i in range(30)]
    summary = run("dedupe", [("good", distinct(100)), ("copies", copies)], {"dedupe": {"max_drop_rate": 1.0}})
    assert summary["rows_out_by_source"] == {"copies": 1, "good": 100}


def test_a_full_export_each_night_is_accepted(run: Run) -> None:
    """Rows edited or added between two exports do not stop the stage either."""
    nights, rows = [], distinct(300)
    for night in range(8):
        nights.append(("chats", list(rows)))
        rows[night * 30 : night * 30 + 30] = [edited(row) for row in rows[night * 30 : night * 30 + 30]]
        rows += distinct(10, seed=100 + night)
    summary = run("dedupe", nights)
    # 300 rows plus 10 per night remain. In each export after the first, 30 rows are new versions.
    assert summary["rows_out"] == 300 + 7 * 10
    assert summary["dropped"] == {"new_version": 7 * 30, "exact_duplicate": 2680 - 370 - 210}
    assert summary["dropped_by_source"] == {"chats": summary["dropped"]}


def test_a_source_contained_in_an_earlier_source_is_accepted(run: Run) -> None:
    rows = distinct(200)
    summary = run("dedupe", [("all", rows), ("some", rows[50:100])])
    assert summary["dropped_by_source"] == {"some": {"exact_duplicate": 50}}


def test_a_source_nearly_contained_in_an_earlier_source_fails_dedupe(run: Run) -> None:
    """The older version of every row would be kept, so a corrected dataset would never be learned."""
    rows = distinct(200)
    with pytest.raises(DataError, match=r"50 of 50 rows of fixed are dropped \(near_duplicate 50\)"):
        run("dedupe", [("all", rows), ("fixed", [edited(row) for row in rows[50:100]])])


def test_templated_rows_in_a_full_export_stay(run: Run) -> None:
    rag = templated(400)
    rows, nights = distinct(100), []
    for night in range(4):
        rows = [*rows, *rag[night * 50 : night * 50 + 50]]
        nights.append(("chats", rows))
    summary = run("dedupe", nights)
    assert (summary["rows_out"], summary["dropped"]) == (300, {"exact_duplicate": 600})


def test_a_dropped_source_of_near_duplicates_fails_dedupe(run: Run) -> None:
    (answer,) = texts(1, size=80, seed=6)
    alike = [chat("Who is it?", f"{answer} number {number}") for number in range(100)]
    with pytest.raises(DataError) as caught:
        run("dedupe", [("good", distinct(1000)), ("alike", alike)])
    first, *shown = str(caught.value).splitlines()
    assert first == (
        "data/dedupe/removed.parquet: 99 of 100 rows of alike are dropped (near_duplicate 99), more than "
        "dedupe.max_drop_rate=0.5; see the merged rows in this file, change them or "
        "dedupe.jaccard_threshold, or raise the limit"
    )
    assert shown[0].startswith("  alike/000002.jsonl:2: near_duplicate of alike/000002.jsonl:1, Jaccard 0.9")
    assert not Path("data/dedupe/examples.parquet").exists()


def test_two_duplicates_of_three_rows_are_accepted(run: Run) -> None:
    (row,) = distinct(1)
    rows = [row, edited(row), edited(edited(row))]
    summary = run("dedupe", [("tiny", rows)])
    assert (summary["rows_out"], summary["dropped"]) == (1, {"near_duplicate": 2})


def test_chats_with_the_same_ending_stay(run: Run) -> None:
    rows = [
        {"messages": [*row["messages"], *chat("No, that is all for today, thanks!", "Bye!")["messages"]]}
        for row in distinct(500)
    ]
    summary = run("decontaminate", [("chats", rows)])
    assert (summary["rows_in"], summary["dropped"]) == (summary["rows_out"], {})
    assert summary["rows_in"] > 400


def test_chats_of_one_template_stay(run: Run) -> None:
    (template,) = texts(1, size=26, seed=5)
    rows = [chat(f"{template} {text}", "yes") for text in texts(1000, size=40, seed=6)]
    assert run("decontaminate", [("chats", rows)])["dropped"] == {}


def test_questions_about_a_few_documents_stay(run: Run) -> None:
    documents, questions = texts(40, size=150, seed=1), texts(400, 8, seed=2)
    rows = [
        chat(f"{documents[i // 10]}\n\n{question}", answer)
        for i, (question, answer) in enumerate(zip(questions, texts(400, 6, seed=3), strict=True))
    ]
    assert run("decontaminate", [("rag", rows)])["dropped"] == {}


def test_one_source_of_benchmark_questions_fails_decontaminate(run: Run, in_tmp: Path) -> None:
    asked = texts(60, seed=5)
    items = [{"id": str(i), "question": q, "choices": ["a", "b"], "answer": 0} for i, q in enumerate(asked)]
    write_text(in_tmp / "data/benchmarks/mine/task.yaml", yaml.safe_dump(CHOICE_TASK))
    write_text(in_tmp / "data/benchmarks/mine/items.jsonl", jsonl(items))
    leaked = [chat(question, answer) for question, answer in zip(asked, texts(60, seed=6), strict=True)]
    with pytest.raises(DataError) as caught:
        run("decontaminate", [("good", distinct(1000)), ("leaked", leaked)])
    first, *shown = str(caught.value).splitlines()
    assert re.match(
        r"data/decontaminate/hits.parquet: (\d+) of \1 rows of leaked are dropped \(same_question \1\), more "
        r"than decontaminate.max_drop_rate=0.5; see the overlaps",
        first,
    )
    assert re.match(r"  leaked/000002.jsonl:\d+: same_question of mine/\d+: \"word", shown[0])
    assert not Path("data/decontaminate/train.parquet").exists()
    assert len(read_rows(Path("data/decontaminate/hits.parquet"))) > 40


def test_a_source_whose_rows_are_all_too_long_fails_pack(run: Run) -> None:
    long = [chat(question, answer) for question, answer in zip(texts(15, 40), texts(15, 40, 9), strict=True)]
    changes = {"pack": {"max_length": 512, "max_lost_token_share": 0.2}}
    with pytest.raises(DataError, match=r"(\d+) of \1 rows of long are dropped \(over_length \1\)") as caught:
        run("pack", [("good", distinct(1000)), ("long", long)], changes)
    assert re.search(
        r"more than pack.max_drop_rate=0.5; p99 is \d+ tokens, the longest example (\d+): set "
        r"pack.max_length=512 to \d+ \(keeps 100.0% of the examples\), or set pack.over_length: split",
        str(caught.value),
    )
    assert not Path("data/pack/train.parquet").exists()


def test_an_empty_training_or_test_set_fails_split(run: Run) -> None:
    with pytest.raises(
        DataError,
        match=r"data/split/test.parquet: 0 of 3 examples, which form 3 group.s.; raise split.test_share",
    ):
        run("split", [("chats", distinct(3))], {"split": {"test_share": 0.0001}})
    with pytest.raises(
        DataError,
        match=r"data/split/train.parquet: 0 of 3 examples, which form 3 group.s.; lower split.test_share",
    ):
        run("split", [("chats", distinct(3))], {"split": {"test_share": 0.9499}})
    with pytest.raises(DataError, match=r"data/split/test.parquet: 0 of 3 examples"):
        run("split", [("chats", distinct(3))], {"split": {"by_phrasing": ["chats"]}})


def test_ordinary_data_loses_no_rows(run: Run) -> None:
    summary = run("pack", [("a", distinct(200)), ("b", distinct(100, seed=50))])
    assert summary["dropped"] == summary["dropped_by_source"] == {}
    kept = json.loads(Path("data/dedupe/summary.json").read_text(encoding="utf-8"))["rows_out_by_source"]
    assert kept == {"a": 200, "b": 100}
