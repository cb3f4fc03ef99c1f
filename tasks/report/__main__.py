"""Write the report from the checkout, the registry and the run's metrics, and log it to MLflow.

`data/` -> `data/report/report.html` and `report.md`. The page is logged to the run `MLFLOW_RUN_ID`; if
it is not set, as in a manual run, to the run that trained the candidate.
"""

import json
import logging
import math
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from nightshift.core.config import load_params
from nightshift.core.errors import GateError
from nightshift.core.files import iterate_rows, read_json, read_rows, write_text
from nightshift.core.paths import (
    AUGMENTED_TRAIN,
    BENCHMARKS,
    CHAMPION_RECORD,
    DATA,
    EFFECTIVE,
    GATE,
    HITS,
    JUDGED,
    METRICS,
    OUTCOME,
    PAGE,
    PLAN,
    REJECTED,
    REPAIRS,
    SCORES,
    SHORT,
    SIMILARITY,
    TEST,
    TRAINING_RUN,
)
from nightshift.core.stage import run_main
from nightshift.core.trained import describe_tuning
from nightshift.data.benchmarks import HELDOUT, read_benchmarks
from nightshift.data.schemas import Score
from nightshift.data.statistics import is_broken
from nightshift.pipeline.graph import stage_order
from nightshift.pipeline.ledger import TRANSFERS
from nightshift.raw.unused import unused_by_snapshot
from nightshift.registry.freshness import CHAMPION_AGE, age_in_days, read_nights
from nightshift.registry.lineage import open_lineage, write_lineage
from nightshift.registry.versions import DIGEST, logged_model, open_registry, registered
from nightshift.tracking.evaluation import log_evaluation
from nightshift.tracking.spool import training_run
from tasks.gate import GateParams
from tasks.judge import VERDICTS
from tasks.report.advice import Outcome
from tasks.report.changes import find_changes
from tasks.report.chart import Chart, draw
from tasks.report.compare import Moves, compare, find_moves, pair
from tasks.report.evidence import Evidence
from tasks.report.examples import accepted_paraphrases, read_examples, rejected_paraphrases
from tasks.report.filters import cell, code, cut, line
from tasks.report.freshness import describe_freshness, draw_freshness
from tasks.report.summary import describe_statistics, headline, summarize

# Rows that overlap with evaluation questions.
SHOWN_HITS = 20
log = logging.getLogger(__name__)


def main() -> None:
    """Write the page and its short version; log the page and the scores to MLflow."""
    client, name = open_registry()
    trained_by = training_run(client, TRAINING_RUN)
    run = os.environ.get("MLFLOW_RUN_ID") or trained_by
    # The page shows the night among the others.
    log_scores(client, name, run)
    facts = collect(client, name, trained_by)
    templates = open_templates()
    write_text(PAGE, templates.get_template("page.html.jinja").render(facts))
    write_text(SHORT, templates.get_template("page.md.jinja").render(facts))
    client.log_artifact(run, str(PAGE))
    log.info("%s: %.0f KB, logged to run %s", PAGE, PAGE.stat().st_size / 1000, run)


def log_scores(client: MlflowClient, name: str, run: str) -> None:
    """Log scores, gain and verdict to a run; an error is only logged."""
    gate = read_json(GATE)
    try:
        version = find_candidate(client, name, gate["candidate"])
        number, model = (int(version.version), logged_model(version)) if version else (None, None)
        log_evaluation(client, run, read_json(METRICS), gate, number, model)
        if version and (age := find_age(client, version)) is not None:
            client.log_metric(run, CHAMPION_AGE, age, step=number)
    except MlflowException as err:
        log.warning("MLflow: the scores are not logged to run %s: %s", run, err)


def find_age(client: MlflowClient, candidate: ModelVersion) -> float | None:
    """Return the champion's age in days when the candidate was registered; None if its data is unknown."""
    champion = read_json(CHAMPION_RECORD)
    if champion["arrival"] is None:
        return None
    version = client.get_model_version(candidate.name, str(champion["version"]))
    return age_in_days(version, candidate.creation_timestamp)


def collect(client: MlflowClient, name: str, trained_by: str) -> dict[str, Any]:
    """Collect the values that the templates show.

    Args:
        client: MLflow client.
        name: Name of the registered model.
        trained_by: Id of the run that trained the candidate.
    """
    params = load_params(GateParams, "gate")
    gate, champion = read_json(GATE), read_json(CHAMPION_RECORD)
    rows = read_scores(SCORES)
    pairs = pair(rows, gate["reference"])
    answered = find_moves([both for both in pairs if both[0]["benchmark"] != HELDOUT])
    heldout = find_moves([both for both in pairs if both[0]["benchmark"] == HELDOUT])
    benchmarks = compare(rows, gate["reference"], params)
    any_benchmark = any(not one.is_loss for one in benchmarks)
    available = {one.name: len(one.items) for one in read_benchmarks(BENCHMARKS)}
    evidence = Evidence(gate, benchmarks, available, params)
    nights = read_nights(client)
    summaries = {stage: read_json(DATA / stage / "summary.json") for stage in stage_order()}
    with tempfile.TemporaryDirectory() as folder:
        write_lineage(Path(folder))
        lineage = read_json(Path(folder) / "lineage.json")
        changes = find_changes_since(name, champion["version"], Path(folder))
    return {
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": name,
        "headline": headline(evidence),
        "sentences": summarize(evidence, find_outcome(client, name, gate["candidate"], champion["version"])),
        "statistics": describe_statistics(evidence),
        "describe_limit": evidence.describe_limit,
        "gate": gate,
        "champion": champion,
        "judged": read_judged(gate),
        "judge_verdicts": VERDICTS,
        "benchmarks": benchmarks,
        "alpha": params.alpha,
        "moves": {**({"Benchmarks": answered} if any_benchmark else {}), "Held-out examples": heldout},
        "freshness": describe_freshness(nights) if nights else None,
        "freshness_chart": draw_freshness(nights),
        "heldout_texts": read_heldout(TEST, heldout),
        "changes": changes,
        "summaries": summaries,
        "repairs": [json.loads(line) for line in REPAIRS.read_text(encoding="utf-8").splitlines()],
        "hits": list(islice(iterate_rows(HITS), SHOWN_HITS)),
        "unused": unused_by_snapshot(),
        "funnel": [stage for stage in summaries if stage in {end[0] for way in TRANSFERS for end in way}],
        "accepted": accepted_paraphrases(AUGMENTED_TRAIN, SIMILARITY),
        "rejected": rejected_paraphrases(AUGMENTED_TRAIN, REJECTED),
        "effective": read_json(EFFECTIVE),
        "training": read_json(TRAINING_RUN),
        "tuning": describe_tuning(),
        "charts": draw_training(client, trained_by),
        "lineage": lineage,
        "trained_by": trained_by,
    }


def read_scores(path: Path) -> list[Score]:
    """Read the scores; a score that is not a number counts as an error.

    All losses use the candidate's token counts: those of a champion on another base are not comparable.
    """
    rows: list[Score] = read_rows(path)
    heldout = [row for row in rows if row["benchmark"] == HELDOUT]
    tokens = {row["item"]: row["tokens"] for row in heldout if row["model"] == "candidate"}
    for row in heldout:
        row["tokens"] = tokens.get(row["item"]) or row["tokens"]
    for row in rows:
        if is_broken(row):
            row["status"] = "error"
    return rows


def read_judged(gate: dict[str, Any]) -> dict[str, Any] | None:
    """Return the judge's verdicts if they are on these two models, else None."""
    judged: dict[str, Any] | None = read_json(JUDGED) if JUDGED.is_file() else None
    same = judged and all(judged[key] == gate[key] for key in ("candidate", "reference"))
    return judged if same else None


def find_candidate(client: MlflowClient, name: str, digest: str | None) -> ModelVersion | None:
    """Return the version with a digest, with its aliases; None if it is not registered."""
    same = [version for version in registered(client, name) if version.tags[DIGEST] == digest]
    return client.get_model_version(name, same[0].version) if same else None


def find_outcome(client: MlflowClient, name: str, candidate: str | None, champion: int | None) -> Outcome:
    """Find the current state of the candidate in the registry.

    Args:
        client: MLflow client.
        name: Name of the registered model.
        candidate: Digest of the candidate's adapter.
        champion: Version that the gate compared with; None before the first champion.
    """
    version = find_candidate(client, name, candidate)
    if version is None:
        return Outcome(None, champion, is_champion=False, waits=None)
    is_challenger = "challenger" in version.aliases and OUTCOME.is_file()
    waits = read_json(OUTCOME)["waits"] if is_challenger else None
    return Outcome(int(version.version), champion, "champion" in version.aliases, waits)


def find_changes_since(name: str, champion: int | None, after: Path) -> dict[str, Any]:
    """Compare with the champion's lineage; without one, return the reason under the key `missing`."""
    if champion is None:
        return {"missing": "There is no champion yet: the candidate was compared with its base."}
    try:
        with open_lineage(name, champion) as before:
            return find_changes(before, after)
    except GateError as err:
        return {"missing": str(err)}


def read_heldout(path: Path, moves: Moves) -> dict[str, Any]:
    """Return item -> messages of the held-out examples with the largest loss differences."""
    wanted = {move["item"] for move in (*moves.gains, *moves.regressions)}
    return {one: row["messages"] for one, row in read_examples(path, wanted).items()}


def draw_training(client: MlflowClient, trained_by: str) -> list[Chart]:
    """Draw the logged losses, and the planned and used learning rates."""
    logged = {
        key: sorted((one.step, one.value) for one in client.get_metric_history(trained_by, key))
        for key in ("loss", "eval_loss", "learning_rate")
    }
    planned = list(enumerate(read_json(PLAN)["learning_rate"], start=1))
    losses = {"training": logged["loss"], "validation": logged["eval_loss"]}
    rates = {"used": logged["learning_rate"], "planned": planned}
    charts = (
        draw("Loss, in nats per token", losses),
        draw("Learning rate", rates, from_zero=True),
    )
    return [chart for chart in charts if chart]


def open_templates() -> Environment:
    """Load the templates, with autoescaping."""
    templates = Environment(
        loader=PackageLoader("tasks.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {"cell": cell, "code": code, "cut": cut, "line": line, "isfinite": math.isfinite}
    return templates


if __name__ == "__main__":
    run_main(main)
