"""The nightly report: written against a real MLflow, read in a real browser, shown in a real Prefect."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from nightshift.core.config import load_params
from nightshift.core.files import read_json, read_rows, write_figures, write_json, write_rows, write_text
from nightshift.core.paths import METRICS, PAGE, SHORT
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.data.schemas import ALL_SCORES, AUGMENTED
from nightshift.registry import versions
from nightshift.tracking.runs import experiment_id, tracking_uri
from tasks.gate import GateParams
from tasks.gate.decision import decide
from tasks.report import __main__ as report
from tests.helpers.browser import Visit, find_browser, open_browser
from tests.helpers.checkouts import ROOT
from tests.helpers.nights import age_by, log_nights
from tests.helpers.report import (
    GATE,
    HOSTILE,
    heldout,
    make_night,
    messages,
    night_scores,
    score,
    write_scores,
)

DATABASE = Path(".nightshift/mlflow.db")
SENTENCES = [
    "The new model is better than the champion on facts (80.0%, +30.0 points, not significant) and the "
    "held-out examples (loss 2.357, -0.071 nats per token, not significant).",
    "It is worse on no benchmark. No slice is worse.",
    "A search over the training data, without training, reaches 60.0% on facts, less than the new model's "
    "80.0%.",
    "The gain on facts is proven: with 95% confidence, the change is between +10.0 and +50.0 points.",
    "Version 2 is now the champion, replacing version 1. `nightshift rollback --reason TEXT` undoes this; "
    "`nightshift history` lists all promotions.",
]
# Returns the texts whose contrast with their background is below WCAG's 4.5.
FAINT = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number)
  const light = (color) => {
    const [r, g, b] = parts(color).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor
    return parts(color)[3] === 0 && element.parentElement ? behind(element.parentElement) : color
  }
  const texts = [...document.body.querySelectorAll('*')].filter((element) =>
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  return texts.filter((element) => {
    const style = getComputedStyle(element)
    const [a, b] = [element.closest('svg') ? style.fill : style.color, behind(element)].map(light)
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5
  }).map((element) => element.textContent)
}"""


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a checkout after a night on which version 2 replaced version 1 as champion."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("NIGHTSHIFT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        make_night(folder)
    return folder


@pytest.fixture
def checkout(in_tmp: Path, night: Path) -> Path:
    """Return a copy of that checkout with its own MLflow; the artifacts stay where they are."""
    shutil.copytree(night / "data", in_tmp / "data")
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", DATABASE):
        (in_tmp / name).parent.mkdir(exist_ok=True)
        shutil.copy(night / name, in_tmp / name)
    return in_tmp


def write_page() -> str:
    """Write the report and return the page."""
    report.main()
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.usefixtures("checkout")
def test_scores_gain_and_verdict_are_logged_to_the_current_run(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(tracking_uri())
    run = client.create_run(experiment_id(client)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    write_page()
    found = client.get_run(run).data
    scored = read_json(METRICS)["candidate"]
    assert found.metrics["eval/facts/accuracy"] == scored["facts"]["accuracy"]
    assert found.metrics["eval/test/loss"] == scored["test"]["loss"]
    assert (found.metrics["eval/gain"], found.metrics["eval/gain_low"]) == (0.3, 0.1)
    assert found.tags["nightshift.verdict"] == "promote"
    assert found.tags["nightshift.version"] == "2"


@pytest.mark.usefixtures("checkout")
def test_the_page_is_logged_to_the_current_run(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(tracking_uri())
    flow = client.create_run(experiment_id(client)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", flow)
    page = write_page()
    kept = download_artifacts(run_id=flow, artifact_path=PAGE.name, tracking_uri=tracking_uri())
    assert Path(kept).read_text(encoding="utf-8") == page
    trained_by = read_json(report.TRAINING_RUN)["run_id"]
    assert client.list_artifacts(trained_by) == []
    monkeypatch.delenv("MLFLOW_RUN_ID")
    report.main()
    assert [file.path for file in client.list_artifacts(trained_by)] == [PAGE.name]


def test_the_page_renders_on_phone_and_desktop_in_light_and_dark_without_requests(checkout: Path) -> None:
    write_page()
    with open_browser() as browser:
        looks: list[tuple[int, Literal["light", "dark"]]] = [(360, "light"), (1200, "dark")]
        for width, scheme in looks:
            visit = Visit(browser, PAGE, width, scheme)
            page = visit.page
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(FAINT) == []
            assert page.title() == "nightshift: promote"
            assert page.locator("h1").inner_text() == "Ship it: the new model is better"
            assert page.locator("header li").all_inner_texts() == [one.replace("`", "") for one in SENTENCES]
            assert page.locator("header li code").all_inner_texts() == [
                "nightshift rollback --reason TEXT",
                "nightshift history",
            ]
            assert page.locator("h2").all_inner_texts() == [
                "Gate checks",
                "Scores",
                "Largest gains and regressions",
                "Freshness",
                "Changes since the champion",
                "Data flow",
                "Paraphrases",
                "Packing",
                "Training",
                "Lineage",
            ]
            pictures = page.locator("svg")
            assert pictures.count() > 20
            for picture in pictures.all():
                box = picture.bounding_box()
                assert box["width"] > 5
                assert box["height"] > 5
            assert page.locator("polyline").count() == 3
            description = page.locator("[aria-label^='Loss, in nats']").get_attribute("aria-label")
            assert description == (
                "Loss, in nats per token. training: 3 at optimizer step 1, lowest 2 at optimizer step 3, "
                "2 at optimizer step 3; validation: 2.2 at optimizer step 3, lowest 2.2 at optimizer step 3, "
                "2.2 at optimizer step 3"
            )
            # Shown as text: a repair, what a row has in common with a question, a source, and a paraphrase.
            assert page.locator("body").inner_text().count(HOSTILE) == 4
            assert page.locator("script, img, article svg").count() == 0
            assert visit.errors == []
            assert visit.requests == [PAGE.absolute().as_uri()]


def test_without_a_browser_the_test_is_skipped_locally_and_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser: none of chromium,"):
        find_browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_browser()


def test_requests_and_errors_of_a_page_are_detected(in_tmp: Path) -> None:
    page = in_tmp / "hostile.html"
    page.write_text(f"<!doctype html>{HOSTILE}", encoding="utf-8")
    with open_browser() as browser:
        visit = Visit(browser, page)
        assert visit.page.title() == "taken"
        assert "http://127.0.0.1:9/x.png" in visit.requests
        assert len(visit.errors) == 1


@pytest.mark.usefixtures("checkout")
def test_the_page_shows_what_was_trained_and_the_settings() -> None:
    page = write_page()
    assert "<dt>trained weights</dt><dd>4,884,480</dd>" in page
    assert "<dt>CPU seconds per second, by rank</dt><dd>0.97, 0.52</dd>" in page
    assert '<th scope="row">precision</th><td>auto</td><td>bf16</td>' in page
    assert '<th scope="row">trained</th>' not in page


@pytest.mark.usefixtures("checkout")
def test_the_page_shows_how_champions_age_night_by_night() -> None:
    page = write_page()
    assert "Version 2 has a loss of 2.500 on the test examples that are newer than the champion" in page
    assert "How fast champions age is known after 5 nights (1 so far)." in page
    nights = age_by(20, [1, 2, 4, 8])
    log_nights(MlflowClient(tracking_uri()), [replace(one, version=10 + one.version) for one in nights])
    page = write_page()
    assert "Loss on the new test examples, in nats per token. champion: 2.034 at version 11, " in page
    assert "Champions lose half of their advantage over the base in 20.0 days (5 nights)." in page


@pytest.mark.usefixtures("checkout")
def test_changed_rows_parameters_and_shards_are_reported() -> None:
    page = plain(write_page())
    assert "Compared with version 1, adapter bbbbbbbbbbbb" in page
    assert "facts 2 1 5" in page
    assert "New shards (1): facts/000002.jsonl (7 training examples)" in page
    assert "sft.learning_rate 0.002 0.001" in page
    assert "Code, base and libraries are unchanged" in page


@pytest.mark.usefixtures("checkout")
def test_the_short_form_has_the_same_sentences_and_scores_and_checks() -> None:
    write_page()
    assert SHORT.read_text(encoding="utf-8").splitlines() == [
        "**Ship it: the new model is better**",
        "",
        *(f"- {one}" for one in SENTENCES),
        "",
        "Gate verdict: promote, against the champion.",
        "",
        "| | model | mean | interval | items |",
        "|---|---|---|---|---|",
        "| facts | base | 20.0% | 5.7% to 51.0% | 10 |",
        "| facts | champion | 50.0% | 23.7% to 76.3% | 10 |",
        "| facts | candidate | 80.0% | 49.0% to 94.3% | 10 |",
        "| facts | retrieval | 60.0% | 31.3% to 83.2% | 10 |",
        "| facts | candidate \N{MINUS SIGN} champion, points | +30.0 | -10.0 to +70.0 | 10 |",
        "| held-out loss | base | 3.000 | 3.000 to 3.000 | 2 |",
        "| held-out loss | champion | 2.429 | 2.400 to 2.500 | 2 |",
        "| held-out loss | candidate | 2.357 | 2.000 to 2.500 | 2 |",
        "| held-out loss | candidate \N{MINUS SIGN} champion | -0.071 | -0.500 to +0.100 | 2 |",
        "",
        "| check | verdict | why |",
        "|---|---|---|",
        "| gain | promote | better: +30.0 points of accuracy |",
        r"| slices | promote | none of 2 significantly worse \| by more than 5 |",
    ]


def test_unused_data_on_disk_is_listed(checkout: Path) -> None:
    line = "On disk but not used, because params.yaml does not list it: source old: 1 shard, 1.5 kB"
    assert "not used" not in write_page()
    write_text(checkout / "data/raw/old/000009.jsonl", "x" * 1500)
    assert line in plain(write_page())
    assert SHORT.read_text(encoding="utf-8").splitlines()[-2:] == ["", line]


def test_what_ingest_changed_and_did_not_read_is_shown(checkout: Path) -> None:
    page = plain(write_page())
    assert "Columns that ingest did not read, with the number of rows: facts rating of user 4" in page
    assert "Rows that ingest changed: mojibake 1" in page
    assert "are not trained on: 1 of 1" in page
    assert "facts/000001.jsonl:9 elements/q1 same question <script>" in page
    assert "Examples of the changes: 1 mojibake, facts/000001.jsonl:3 before: CafÃ© after: <script>" in page


def test_a_night_without_a_benchmark_is_judged_and_shown_by_its_loss(checkout: Path) -> None:
    rows = [
        heldout(model, f"t{i:03}", tokens * (loss + 0.1 * (-1) ** i), tokens)
        for model, loss in (("base", 2.5), ("champion", 2.31), ("candidate", 1.87))
        for i in range(120)
        for tokens in [5 + i % 7]
    ]
    write_scores(checkout / "data", rows)
    digests = {"base": None, "candidate": GATE["candidate"], "champion": "b" * 64}
    write_figures(report.GATE, decide(rows, digests, (), load_params(GateParams, "gate")))
    sentences = [
        "Against the champion, the loss on 120 test examples fell from 2.310 to 1.870 nats per token "
        "(-19.0%, 95% interval -19.0% to -19.0%).",
        "The lower loss is proven.",
    ]
    page = plain(write_page())
    assert f"Ship it: the new model is better {' '.join(sentences)} Version 2 is now the champion" in page
    assert "ignored: gate.retention lists it, but no benchmark with this name was scored" in page
    assert "Held-out examples 0 worse, 120 better, 0 unchanged." in page
    assert "0 worse, 0 better" not in page
    assert SHORT.read_text(encoding="utf-8").startswith(
        f"**Ship it: the new model is better**\n\n- {sentences[0]}\n- {sentences[1]}\n"
    )
    with open_browser() as browser:
        visit = Visit(browser, PAGE)
        assert visit.errors == []
        assert "fell from 2.310 to 1.870" in visit.page.inner_text("h1 + ul")


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (
            "hold",
            "Do not ship it yet: the result is inconclusive The new model is better than the champion on "
            "facts "
            "(80.0%, +30.0 points, not significant) and",
        ),
        (
            "reject",
            "Do not ship it: the new model is not good enough The new model is better than the champion on "
            "facts "
            "(80.0%, +30.0 points, not significant) and",
        ),
        (
            "error",
            "Do not ship it: the scores cannot be used The gate could not decide: gain: better: +30.0 points "
            "of "
            "accuracy. The new model is not registered;",
        ),
    ],
)
def test_a_candidate_that_was_not_promoted_is_reported(checkout: Path, verdict: str, expected: str) -> None:
    checks = [{**GATE["checks"][0], "verdict": verdict}]
    write_json(report.GATE, {**GATE, "verdict": verdict, "candidate": "d" * 64, "checks": checks})
    scores = night_scores()
    for row in scores:
        row["score"] = float("nan") if row["model"] == "candidate" else row["score"]
    if verdict == "error":
        write_scores(checkout / "data", scores)
    page = plain(write_page())
    assert expected in page
    assert "The new model is not registered; version 1 remains the champion." in page
    assert ("candidate 10 error" in page) == (verdict == "error")


def test_a_night_without_anything_new_is_not_called_inconclusive(checkout: Path) -> None:
    checks = [{"name": "candidate", "verdict": "hold", "message": "the candidate is the champion"}]
    found = {key: GATE[key] for key in ("reason", "reference", "candidate")}
    write_json(report.GATE, {**found, "verdict": "hold", "checks": checks})
    page = plain(write_page())
    assert "Nothing new: the champion is kept The new model is identical to the champion." in page
    assert "inconclusive" not in page


def test_the_page_shows_how_to_promote_a_waiting_version(checkout: Path) -> None:
    client, name = versions.open_registry()
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "challenger", "2")
    write_json(report.OUTCOME, {"promoted": False, "waits": "registry.approval is manual"})
    expected = (
        "Version 2 waits for approval (registry.approval is manual); version 1 remains the champion. To ship "
        "it, "
        "type nightshift promote 2 --reason TEXT ."
    )
    assert expected in plain(write_page())
    # The alias of an earlier night, and a verdict that needs no approval.
    write_json(report.OUTCOME, {"promoted": False, "waits": None})
    assert "Version 2 is registered, but not promoted; version 1 remains the champion." in plain(write_page())


@pytest.mark.usefixtures("checkout")
def test_the_statistics_of_the_gain_are_below_the_table_of_checks() -> None:
    page = plain(write_page())
    assert page.count("p = 0.0001") == 1
    assert "by more than 5 Gain: p = 0.0001 in a one-sided paired test." in page


def test_a_limit_on_the_items_is_named_with_the_gain_and_the_scores(checkout: Path) -> None:
    folder = checkout / "data" / "benchmarks" / "facts"
    item = {"question": "What is it?", "choices": ["this", "that"], "answer": 0}
    write_text(folder / "items.jsonl", "".join(json.dumps({"id": f"q{i}", **item}) + "\n" for i in range(25)))
    write_text(folder / "task.yaml", yaml.safe_dump(CHOICE_TASK))
    page = plain(write_page())
    assert "between +10.0 and +50.0 points; 10 of 25 items were asked (evaluate.limit)." in page
    assert "all items, 10 of 25 items were asked (evaluate.limit), chance 25.0%" in page
    assert "even, 5 items" in page


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"version": 1, "reason": None}, "training started from version 1"),
        ({"version": None, "reason": "there was no champion yet"}, "the base: there was no champion yet"),
        ({"version": None, "reason": None}, "training started from the base trained weights"),
    ],
)
def test_where_training_started_is_shown(checkout: Path, start: dict[str, Any], expected: str) -> None:
    write_json(report.EFFECTIVE, {**read_json(report.EFFECTIVE), "start": start})
    assert expected in plain(write_page())
    assert checkout.is_dir()


def test_a_judgement_is_shown_next_to_the_scores(checkout: Path) -> None:
    judged = {"model": "judge-1", "reference": "champion", "candidate": GATE["candidate"], "judged": []}
    write_json(report.JUDGED, {**judged, "counts": {"facts": {"better": 7, "undecided": 2}}})
    assert "benchmark better worse equal undecided unanswered facts 7 0 0 2 0" in plain(write_page())
    # A judgement of another night does not apply to this one.
    write_json(report.JUDGED, {**judged, "candidate": "d" * 64, "counts": {}})
    assert "judge-1" not in plain(write_page())
    assert checkout.is_dir()


def test_a_missing_champion_and_missing_losses_are_reported(checkout: Path) -> None:
    client = MlflowClient(tracking_uri())
    write_json(report.TRAINING_RUN, {"run_id": client.create_run(experiment_id(client)).info.run_id})
    write_json(report.CHAMPION_RECORD, {"version": None, "digest": None, "arrival": None, "best": {}})
    write_json(report.GATE, {**GATE, "reference": "base"})
    rows = [row for row in night_scores() if row["model"] in ("base", "candidate")]
    write_rows(report.SCORES, rows, ALL_SCORES)
    page = plain(write_page())
    assert "There is no champion yet: the candidate was compared with its base." in page
    assert "MLflow has no losses for the training run" in page
    assert "candidate \N{MINUS SIGN} base, points +60.0" in page
    assert "Version 2 is now the champion. nightshift history lists all promotions." in page
    assert "1 worse, 7 better, 2 unchanged" in page
    assert "facts / even / q8" in page


def test_a_page_with_long_texts_and_many_slices_steps_and_shards_is_below_2_mb(checkout: Path) -> None:
    long = "\N{GRINNING FACE}<" * 2500
    texts = {"question": long, "expected": long, "answer": long}
    rows = [
        score(model, i, i * len(model) % 5 / 4, benchmark=f"b{i % 4}", slice=f"{i % 400} {long}", **texts)
        for model in ("base", "champion", "candidate", "retrieval")
        for i in range(800)
    ]
    write_scores(checkout / "data", [*rows, *(row for row in night_scores() if row["benchmark"] == "test")])
    examples = read_rows(report.AUGMENTED_TRAIN)
    parents = [{**row, "messages": messages(long, long) * 30} for row in examples[:6]]
    children = [{**parents[0], "id": f"p{i}", "parent_id": "e1", "style": "reword"} for i in range(9)]
    write_rows(report.AUGMENTED_TRAIN, [*parents, *children], AUGMENTED)
    columns = pq.read_schema(report.REJECTED)
    again = {**read_rows(report.REJECTED)[0], "messages": messages(long, long) * 30}
    write_rows(report.REJECTED, [{**again, "reason": f"reason {i}"} for i in range(20)], columns)
    write_json(report.PLAN, {"learning_rate": [i / 100_000 for i in range(100_000)]})
    shards = {f"facts/{i:06d}.jsonl": "9" * 64 for i in range(5000)}
    write_json(checkout / "data" / "raw" / "digests.json", shards)
    checks = [{"name": "contamination", "verdict": "error", "message": long}]
    write_json(report.GATE, {**GATE, "verdict": "error", "reason": long, "checks": checks})
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("n_resamples: 10000", "n_resamples: 1000"))
    page = write_page()
    assert 300_000 < len(page.encode()) < 2_000_000
    assert "… (4,200 more characters)" in page
    text = plain(page)
    assert "the largest 20, 80 more are in data/evaluate/scores.parquet" in text
    assert "4900 earlier shards are not shown" in text
    assert "planned, each point the mean of 334 steps" in text


def test_the_flow_links_to_the_page_even_if_the_verdict_is_error(
    checkout: Path, clean_environment: dict[str, str]
) -> None:
    write_json(report.GATE, {**GATE, "verdict": "error", "reason": "3 scores are not numbers"})
    client = MlflowClient(tracking_uri())
    run = client.create_run(experiment_id(client)).info.run_id
    program = f"""
import json
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness
from flows.finetune import ship

@flow
def night() -> None:
    ship({run!r})

# A busy machine starts the server in more than the half minute that is usual.
with prefect_test_harness(server_startup_timeout=120):
    state = night(return_state=True)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    print(json.dumps([state.message, [[one.type, one.key, one.data] for one in found]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean_environment, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(checkout / "prefect")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    message, artefacts = json.loads(done.stdout.splitlines()[-1])
    assert "3 scores are not numbers; nothing is registered" in message
    shown = {key: (kind, data) for kind, key, data in artefacts}
    assert shown["report-page"] == ("markdown", f"[full report]({PAGE.absolute().as_uri()})")
    assert shown["report"] == ("markdown", SHORT.read_text(encoding="utf-8"))
    short = SHORT.read_text(encoding="utf-8")
    assert short.startswith(
        "**Do not ship it: the scores cannot be used**\n\n- The gate could not decide: 3 scores"
    )
    assert [file.path for file in client.list_artifacts(run)] == [PAGE.name]


def plain(page: str) -> str:
    """Return the text of a page as one line."""
    from html import unescape
    from re import DOTALL, sub

    without_style = sub(r"<style>.*?</style>", " ", page, flags=DOTALL)
    return " ".join(unescape(sub(r"<[^>]+>", " ", without_style)).split()).replace(" ,", ",")
