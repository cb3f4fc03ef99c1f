"""Run the stage: read the scores, find overlaps with the training data, write the verdict."""

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
from nightshift.data.benchmarks import evaluation_questions, questions_of
from nightshift.data.text import canonical
from nightshift.registry.bases import base_digest
from tasks.gate import GateParams
from tasks.gate.checks import Check
from tasks.gate.decision import conclude, decide


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
        decision = decide(rows, models, champion["looks"], overlaps, params, is_same_base=is_same_base)
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
    """Describe the training rows that contain an evaluation question as an exact match.

    The stage decontaminate removes exact matches and looser overlaps. This check also covers a benchmark
    that was added after that stage, or a training set from elsewhere.
    """
    evaluated = {
        canonical(text): f"{name}/{item}" for name, item, text in evaluation_questions(test, benchmarks)
    }
    return [
        f"{row['origin']} matches {evaluated[text]}"
        for row in iterate_rows(train, ["origin", "messages"])
        for question in questions_of(row)
        if (text := canonical(question)) in evaluated and text
    ]


if __name__ == "__main__":
    run_main(main)
