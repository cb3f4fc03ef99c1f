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
from nightshift.data.benchmarks import HELDOUT, questions, questions_of, read_benchmarks
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
        decision = decide(rows, models, champion["looks"], overlaps, params, is_same_base=is_same_base)
    for check in find_ignored({row["benchmark"] for row in rows}, params):
        log.warning("%s: %s", check.name, check.message)
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
    asked = {
        canonical(text): f"{one.name}/{item['id']}"
        for one in read_benchmarks(benchmarks)
        for item in one.items
        for text in questions(item)
    }
    held_out = {prompt_of(row): f"{HELDOUT}/{row['id']}" for row in iterate_rows(test, ["id", "messages"])}
    found = []
    for row in iterate_rows(train, ["origin", "messages"]):
        prompt, texts = prompt_of(row), [canonical(question) for question in questions_of(row)]
        matches = (held_out.get(prompt) if prompt else None, *(asked.get(text) for text in texts if text))
        found += [f"{row['origin']} matches {match}" for match in matches if match]
    return found


def prompt_of(row: Mapping[str, Any]) -> str:
    """Return all turns of a row but the assistant's, in canonical form."""
    return canonical("\n".join(turn["content"] for turn in row["messages"] if turn["role"] != "assistant"))


if __name__ == "__main__":
    run_main(main)
