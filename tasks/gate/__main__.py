"""Run the stage: read the scores, find overlaps with the training data, write the verdict."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nightshift.core.config import load_params
from nightshift.core.files import iterate_rows, read_json, read_rows, write_figures
from nightshift.core.paths import (
    BASE_RECORD,
    BENCHMARKS,
    CHAMPION_RECORD,
    CLEAN_TRAIN,
    GATE,
    MODELS,
    SCORES,
    TEST,
)
from nightshift.core.stage import run_main, write_summary
from nightshift.data.benchmarks import HELDOUT, evaluation_questions, prompt_of, questions_of
from nightshift.data.text import canonical
from nightshift.registry.bases import base_digest
from tasks.gate import GateParams
from tasks.gate.checks import Check, find_ignored
from tasks.gate.decision import conclude, decide

log = logging.getLogger(__name__)


def main() -> None:
    """Compare the models; write the verdict with its evidence."""
    params = load_params(GateParams, "gate")
    rows, champion = read_rows(SCORES), read_json(CHAMPION_RECORD)
    overlaps = find_overlaps(CLEAN_TRAIN, TEST, BENCHMARKS)
    models = read_json(MODELS)
    if missing := find_missing_base(champion, rows):
        known = {"reference": "champion", "candidate": models["candidate"]}
        decision = {**known, **conclude([Check("champion", "error", missing)])}
    else:
        is_same_base = (
            champion["version"] is None or champion["base"]["files"] == read_json(BASE_RECORD)["files"]
        )
        best = {name: one["version"] for name, one in champion["best"].items()}
        decision = decide(rows, models, overlaps, params, best, is_same_base=is_same_base)
    for check in find_ignored({row["benchmark"] for row in rows}, params):
        log.warning("%s: %s", check.name, check.message)
    for note in decision["checks"]:
        if note["message"].startswith("saturated: "):
            log.warning("%s: %s", note["name"], note["message"])
    write_figures(GATE, decision)
    write_summary("gate", rows_in=len(rows), rows_out=len(rows), verdict=decision["verdict"])


def find_missing_base(champion: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why the champion could not be scored and how to fix it, or None if it was scored."""
    if champion["version"] is None or any(row["model"] == "champion" for row in rows):
        return None
    base = champion["base"]
    name = f"{base['model']} ({base['dtype']}, digest {base_digest(base['files'])})"
    return (
        f"version {champion['version']} has no scores, because its base {name} was not found in "
        "data/base/model, in the state folder, or where it was at registration; run "
        "`NIGHTSHIFT_BASE=FOLDER nightshift snapshot` with a folder that contains its files, or `dvc repro "
        "base` with this base.model and `nightshift snapshot`, then rerun; or promote another version"
    )


def find_overlaps(train: Path, test: Path, benchmarks: Path) -> list[str]:
    """Describe the training rows that ask a benchmark's question, or equal a test example up to answers.

    The stage decontaminate removes these and looser overlaps. This check also covers a benchmark that was
    added after that stage, or a training set from elsewhere. A single turn does not identify a test example:
    many chats end with "Thanks!".
    """
    evaluated = {
        (name == HELDOUT, canonical(text)): f"{name}/{item}"
        for name, item, text, *_ in evaluation_questions(test, benchmarks)
    }
    return [
        f"{row['origin']} matches {evaluated[asked]}"
        for row in iterate_rows(train, ["origin", "messages"])
        for asked in [
            (True, canonical(prompt_of(row))),
            *((False, canonical(question)) for question in questions_of(row)),
        ]
        if asked in evaluated and asked[1]
    ]


if __name__ == "__main__":
    run_main(main)
