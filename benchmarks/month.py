"""A month of nights on the demo with three planted events: a real gain, a leak, and a slow rot.

The real pipeline in a clone of this checkout, with its servers: one `nightshift run` for each of 30 nights,
dated with `snapshot.until`; on most of them, nothing is new. Model, data, benchmark and `gate.alpha` are the
demo's.

- Gain: the first champion knows half of the elements; then all of them arrive. It must be promoted.
- Leak: questions of the benchmark arrive with their answers, as they are, and within an answer. Each must be
  named, and none trained on.
- Rot: a growing share of the elements is missing from the training data, while notes about other things
  arrive. The gate asks for a lower loss on what is new (`gate.objective: non_inferiority`), which the notes
  give, and no candidate loses more than the margin against the champion of its night. The best champion so
  far must stop the sum of the losses.

    python -m benchmarks.month FOLDER

takes most of an hour on 2 CPU cores, and continues after an interruption if the folder exists. It writes
`benchmarks/results/month.json`; the exit code is 1 if an event did not end as it must.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import RESULTS, Record, about, record, require_bounds
from benchmarks.stages import ROOT, environment
from nightshift.core.files import jsonl, read_json, read_rows, write_figures
from nightshift.core.ports import free_port
from nightshift.core.stage import run_main
from nightshift.pipeline.params_yaml import edit
from tasks.snapshot.sources.packages import element_items

PACKAGES = ("torch", "transformers", "peft", "trl", "mendeleev")
FIRST = datetime(2026, 9, 1, 2, tzinfo=UTC)
NIGHTS = 30
BENCHMARK = "elements"
# Sources of the leaks and of the notes.
QUIZ, NOTES = "quiz", "notes"
# Questions that leak as they are, and within an answer.
ASKED, TOLD = 40, 20
# Rows of a file of notes; three tenths of them are test examples.
NOTED = 80
# What each file of notes asks about every element in it, and answers.
MOVES = (
    ("Where do we keep the jar of {}?", "Please look for {} on shelf {} of the cellar."),
    ("Our students want to see {}. Which way?", "We have moved {} upstairs, to cabinet {}."),
)
PARAMS: dict[str, Any] = {
    "snapshot.sources.elements": {"path": "package:mendeleev", "limit": 0.5},
    # Fewer dialogs, benchmarks and baselines, so that a night costs three minutes.
    "snapshot.sources.dialogs": {"path": "package:chatterbot-corpus", "limit": 0.1},
    "snapshot.benchmarks": {BENCHMARK: "package:mendeleev"},
    "evaluate.retrieval": None,
    "evaluate.limit": None,
    "split.by_phrasing": [BENCHMARK, QUIZ],
    "split.test_share": 0.3,
    # All rows of a source may be leaks.
    "decontaminate.max_drop_rate": 1.0,
    # 641 items about 118 elements cannot prove that less was lost; of dialogs and of each file of notes,
    # there are two dozen test examples.
    "gate.margin": 0.15,
    "gate.max_loss_increase": 0.3,
    "gate.min_items": 15,
    "gate.nights": NIGHTS,
}
# Night -> what changes in params.yaml; notes arrive on the nights of ROT.
GAIN, LEAK, ROT = 4, 8, (12, 13)
CHANGES: dict[int, dict[str, Any]] = {
    1: PARAMS,
    GAIN: {"snapshot.sources.elements": "package:mendeleev"},
    LEAK: {f"snapshot.sources.{QUIZ}": f"{QUIZ}/*.jsonl"},
    ROT[0]: {
        "gate.objective": "non_inferiority",
        f"snapshot.sources.{NOTES}": f"{NOTES}/*.jsonl",
        "snapshot.sources.elements": {"path": "package:mendeleev", "limit": 0.65},
    },
    ROT[1]: {"snapshot.sources.elements": {"path": "package:mendeleev", "limit": 0.3}},
}
STATE = re.compile(r"^(?P<name>[A-Z]\w+): (?P<message>.+)$")
NOTHING_NEW, PROMOTED = "NothingNew", "Promoted"
# What the gate calls the version that has stopped the rot, in the names of its checks.
BEST = "the best so far"


@dataclass(frozen=True, slots=True)
class Night:
    """How a night ended.

    Attributes:
        night: Number, from 1.
        date: Date of the night.
        state: Name of the final state, or Failed.
        message: Its message, with the reason and the champion, or the error.
        seconds: Duration.
        checks: Check of the gate -> verdict, if the gate judged a candidate.
        accuracy: Model -> accuracy on the benchmark, if the gate judged a candidate.
        leaks: Questions of the benchmark that decontaminate named on the night of the leak.
    """

    night: int
    date: str
    state: str
    message: str
    seconds: float
    checks: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("folder", type=Path, help="folder of the clone; if it exists, continues there")


def main(folder: Path) -> None:
    """Run the nights that are still missing, and write results/month.json."""
    folder = folder.absolute()
    if not (folder / "params.yaml").is_file():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        plant(folder)
    file = folder / "month.json"
    nights = [Night(**one) for one in read_json(file)] if file.is_file() else []
    shell = {**environment(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell |= {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    try:
        for number in range(len(nights) + 1, NIGHTS + 1):
            nights.append(run_night(folder, shell, number))
            write_figures(file, [asdict(night) for night in nights])
            sys.stdout.write(f"night {number}: {nights[-1].state}: {nights[-1].message}\n")
            sys.stdout.flush()
    finally:
        subprocess.run(["nightshift", "down"], cwd=folder, env=shell, check=True)
    records = judge(nights)
    write_figures(
        RESULTS / "month.json",
        {"events": records, "nights": [asdict(night) for night in nights], **about(PACKAGES)},
    )
    require_bounds(records)


def plant(folder: Path) -> None:
    """Write all files that arrive in the month, each with the date of its arrival."""
    items = list(element_items())
    random.Random(0).shuffle(items)
    leaks = [
        *(chat(one["question"], right(one)) for one in items[:ASKED]),
        *(
            chat(f"Quiz me about {one['cluster']}.", f"{one['question']} {right(one)}")
            for one in items[ASKED : ASKED + TOLD]
        ),
    ]
    arrive(folder / QUIZ / "leak.jsonl", LEAK, leaks)
    names = sorted({item["cluster"] for item in items})
    for night, (question, answer) in zip(ROT, MOVES, strict=True):
        chosen = random.Random(night).sample(names, NOTED)
        rows = (
            chat(question.format(name), answer.format(name, number)) for number, name in enumerate(chosen, 1)
        )
        arrive(folder / NOTES / f"{night}.jsonl", night, rows)


def right(item: Mapping[str, Any]) -> str:
    """Return the right answer to a question of the benchmark."""
    choices: list[str] = item["choices"]
    answer: int = item["answer"]
    return choices[answer]


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a row of training data."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def arrive(file: Path, night: int, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file that arrives in the hour before a night."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(jsonl(rows)), encoding="utf-8")
    moment = (date_of(night) - timedelta(hours=1)).timestamp()
    os.utime(file, (moment, moment))


def date_of(night: int) -> datetime:
    """Return the moment when a night starts."""
    return FIRST + timedelta(days=night - 1)


def run_night(folder: Path, shell: dict[str, str], number: int) -> Night:
    """Run one night, and read how it ended."""
    path, date = folder / "params.yaml", date_of(number).isoformat()
    changes = {"snapshot.until": date, **CHANGES.get(number, {})}
    path.write_text(edit(path.read_text(encoding="utf-8"), changes), encoding="utf-8")
    start = time.perf_counter()
    done = subprocess.run(
        ["nightshift", "run"], cwd=folder, env=shell, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    lines = (done.stdout + done.stderr).strip().splitlines()
    found = next((found for line in reversed(lines) if (found := STATE.match(line))), None)
    if done.returncode or found is None:
        return Night(number, date, "Failed", lines[-1], seconds)
    ended = (number, date, found["name"], found["message"], seconds)
    hits = read_rows(folder / "data" / "decontaminate" / "hits.parquet")
    leaks = [hit["item"] for hit in hits if number == LEAK and hit["origin"].startswith(f"{QUIZ}/")]
    if found["name"] == NOTHING_NEW:
        return Night(*ended, leaks=leaks)
    checks = read_json(folder / "data" / "gate" / "gate.json")["checks"]
    scores = defaultdict[str, list[float]](list)
    for row in read_rows(folder / "data" / "evaluate" / "scores.parquet"):
        if row["benchmark"] == BENCHMARK and row["status"] == "ok":
            scores[row["model"]].append(row["score"])
    accuracy = {model: mean(values) for model, values in scores.items()}
    return Night(*ended, {one["name"]: one["verdict"] for one in checks}, accuracy, leaks)


def judge(nights: Sequence[Night]) -> list[Record]:
    """Say of each event whether it ended as it must."""
    by_number = {night.night: night for night in nights}
    leak, rot = by_number[LEAK], [by_number[number] for number in ROT]
    stopped = next((number for number, night in enumerate(rot) if night.state != PROMOTED), len(rot))
    failed = [{name for name, verdict in night.checks.items() if verdict != "promote"} for night in rot]
    by_best = [names for names in failed[stopped:] if names and all(BEST in name for name in names)]
    quiet = [one.night for one in nights if one.night not in (1, GAIN, *ROT) and one.state != NOTHING_NEW]
    promoted_later = [night.night for night in rot[stopped:] if night.state == PROMOTED]
    return [
        record("gain: promoted", by_number[GAIN].state == PROMOTED, "nights", at_least=1),
        record("leak: questions named", len({*leak.leaks}), "questions", at_least=ASKED + TOLD),
        record("leak: model unchanged", leak.state == NOTHING_NEW, "nights", at_least=1),
        record("rot: promoted before it was stopped", stopped, "nights", at_least=1),
        record("rot: stopped by the best champion only", len(by_best), "nights", at_least=1),
        record("rot: promoted after it was stopped", len(promoted_later), "nights", at_most=0),
        record("nights without an event that changed something", len(quiet), "nights", at_most=0),
    ]


if __name__ == "__main__":
    run_main(main, declare)
