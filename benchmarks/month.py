"""A month of nights on the demo with planted events: a gain, reports, a slow rot, and leaks.

The real pipeline in a clone, with its servers: one `nightshift run` for each of 30 nights; on most of them,
nothing is new. The reports are about invented towns, each with an animal at each of its places. Which animal
depends on the kind of the town, and the benchmark `towns` asks for it in other words and other towns. The
rot is a share of the elements in training that shrinks with each arrival of reports, whose gain hides it. The
leaks are questions of the benchmark in the training data: as they are, and within an answer.

    python -m benchmarks.month FOLDER

takes most of an hour, and goes on where it was interrupted if the folder exists. It writes
`benchmarks/results/month.json`.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, about
from benchmarks.stages import ROOT, environment
from nightshift.core.files import jsonl, read_json, read_rows, write_figures
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.pipeline.params_yaml import edit
from tasks.sft.launch import free_port

NIGHTS = 30
KINDS = ("Harbour", "Hill", "Forest", "Bridge", "Castle", "Mill", "Abbey", "Market", "Mine", "Lake")
ANIMALS = ("otter", "heron", "badger", "salmon", "lynx", "raven", "beaver", "falcon", "weasel", "trout")
# A place in a town, and what it is in the words of the benchmark.
PLACES = {"shield": "coat of arms", "well": "village fountain", "tower": "highest building"}
# Towns in each report, and in the benchmark for each place.
TOLD, ASKED = 80, 80
PARAMS: dict[str, Any] = {
    # 120 items about 79 elements can prove that no more than 15 points were lost.
    "gate.margin": 0.15,
    "gate.nights": NIGHTS,
    "evaluate.limit": 240,
    "evaluate.retrieval": None,
    "snapshot.sources.dialogs": {"path": "package:chatterbot-corpus", "weight": 0.3},
}
STATE = re.compile(r"^(?P<name>[A-Z]\w+): (?P<message>.+)$")


@dataclass(frozen=True, slots=True)
class Night:
    """What one night is expected to end as, and what it ended as.

    Attributes:
        night: Number, from 1.
        event: What was planted.
        expected: Name of the final state.
        state: Name of the final state, or Failed.
        message: Its message, or the error.
        champion: Version that is the champion afterwards.
        accuracy: Benchmark -> accuracy of the candidate.
        hits: Training rows that decontaminate removed.
        seconds: Duration.
    """

    night: int
    event: str
    expected: str
    state: str
    message: str
    champion: int | None
    accuracy: dict[str, float]
    hits: int
    seconds: float


def main(folder: Path) -> None:
    """Run the nights that are still missing, and write the results."""
    if not (folder / "params.yaml").is_file():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        change(folder, PARAMS)
    record = folder / "month.json"
    nights = read_json(record) if record.is_file() else []
    shell = {**environment(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell |= {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    try:
        for number in range(len(nights) + 1, NIGHTS + 1):
            event, expected, plant = EVENTS.get(number, ("nothing new", "NothingNew", no_change))
            plant(folder)
            night = run_night(folder, shell, number, event, expected)
            nights.append(asdict(night))
            write_figures(record, nights)
            sys.stdout.write(f"night {number:2}, {event}: {night.state}: {night.message}\n")
            sys.stdout.flush()
    finally:
        subprocess.run(["nightshift", "down"], cwd=folder, env=shell, check=True)
    write_figures(
        RESULTS / "month.json", {"nights": nights, **about(["torch", "transformers", "peft", "trl"])}
    )
    if wrong := [night["night"] for night in nights if night["state"] != night["expected"]]:
        raise SystemExit(f"not as expected: night {', '.join(map(str, wrong))}")


def run_night(folder: Path, shell: dict[str, str], number: int, event: str, expected: str) -> Night:
    """Run one night, and read how it ended."""
    start = time.perf_counter()
    done = subprocess.run(
        ["nightshift", "run"], cwd=folder, env=shell, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    ending = next((found for line in reversed(lines) if (found := STATE.match(line))), None)
    state, message = (
        (ending["name"], ending["message"]) if ending and not done.returncode else ("Failed", lines[-1])
    )
    champion = read_json(folder / "data/champion/champion.json")["version"]
    scored = read_json(folder / "data/evaluate/metrics.json")["candidate"]
    return Night(
        number,
        event,
        expected,
        state,
        message,
        champion if state == "Failed" else read_json(folder / ".nightshift/scoreboard.json")["champion"],
        {name: one["accuracy"] for name, one in scored.items() if "accuracy" in one},
        len(read_rows(folder / "data/decontaminate/hits.parquet")),
        time.perf_counter() - start,
    )


def change(folder: Path, changes: dict[str, Any]) -> None:
    """Change parameters, `section.key` -> value."""
    path = folder / "params.yaml"
    path.write_text(edit(path.read_text(encoding="utf-8"), changes), encoding="utf-8")


def no_change(folder: Path) -> None:
    """Let a night have nothing new."""


def name_towns(count: int, seed: int) -> list[str]:
    """Invent names of towns, such as Korvath Harbour."""
    chance = random.Random(seed)
    heads, middles = (
        ("Or", "Bel", "Tam", "Vel", "Kor", "Lin", "Mar", "Sed", "Ul", "Fen"),
        ("va", "ri", "do", "lu"),
    )
    tails = ("th", "rak", "nel", "mond", "sk", "ven", "dor", "lis", "gar", "by")
    names = [
        " ".join(("".join(parts), kind)) for *parts, kind in itertools.product(heads, middles, tails, KINDS)
    ]
    return chance.sample(names, count)


def animal_of(town: str, place: str) -> str:
    """Return the animal at a place of a town, which depends on the kind of the town."""
    order = random.Random(place).sample(ANIMALS, len(ANIMALS))
    return order[KINDS.index(town.split()[-1])]


def ask(town: str, place: str) -> str:
    """Return a question of the benchmark."""
    return f"Of which creature can visitors of the town {town} see a picture on the {PLACES[place]}?"


def answer(town: str, place: str, animal: str) -> str:
    """Return the answer that names an animal."""
    return f"The {place} of {town} shows the {animal}."


def write_benchmark(folder: Path) -> None:
    """Write the benchmark: four choices for each place of towns that no report is about."""
    items = []
    for place, town in itertools.product(PLACES, name_towns(ASKED, seed=99)):
        right = animal_of(town, place)
        others = random.Random(town + place).sample([one for one in ANIMALS if one != right], 3)
        animals = sorted([right, *others])
        items.append(
            {
                "id": f"{place}/{town}",
                "slice": place,
                "question": ask(town, place),
                "choices": [answer(town, place, animal) for animal in animals],
                "answer": animals.index(right),
            }
        )
    target = folder / "towns"
    target.mkdir(exist_ok=True)
    (target / "task.yaml").write_text(json.dumps(CHOICE_TASK), encoding="utf-8")
    (target / "items.jsonl").write_text("".join(jsonl(items)), encoding="utf-8")


def chat(question: str, reply: str) -> dict[str, Any]:
    """Return a row of training data."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def arrive(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Add a file to the reports."""
    target = folder / "arrivals"
    target.mkdir(exist_ok=True)
    (target / f"{name}.jsonl").write_text("".join(jsonl(rows)), encoding="utf-8")


def report(folder: Path, place: str, weight: float) -> None:
    """Report what is at a place of many towns, and train on a share of the elements."""
    towns = name_towns(TOLD, seed=list(PLACES).index(place))
    rows = [
        chat(f"What is on the {place} of {town}?", answer(town, place, animal_of(town, place)))
        for town in towns
    ]
    arrive(folder, place, rows)
    change(
        folder,
        {
            "snapshot.sources.elements": {"path": "package:mendeleev", "weight": weight},
            "snapshot.sources.reports": {"path": "arrivals/*.jsonl", "weight": 3},
        },
    )


def first_report(folder: Path) -> None:
    """Start the reports, and the benchmark about them."""
    write_benchmark(folder)
    change(folder, {"snapshot.benchmarks.towns": "towns"})
    report(folder, "shield", 1.0)


def leak(folder: Path, name: str, *, within_answer: bool) -> None:
    """Leak forty questions of the benchmark, with their answers, into the reports."""
    place = "tower" if within_answer else "well"
    asked = [
        (ask(town, place), answer(town, place, animal_of(town, place)))
        for town in name_towns(ASKED, seed=99)[:40]
    ]
    rows = (chat("Ask me something.", " ".join(both)) if within_answer else chat(*both) for both in asked)
    arrive(folder, name, rows)


Event = tuple[str, str, Callable[[Path], None]]
EVENTS: dict[int, Event] = {
    1: ("the demo", "Promoted", no_change),
    6: ("reports on shields", "Promoted", first_report),
    10: ("reports on wells, half of the elements", "Promoted", partial(report, place="well", weight=0.5)),
    14: ("reports on towers, a quarter of the elements", "Held", partial(report, place="tower", weight=0.25)),
    18: ("all elements again", "Promoted", partial(report, place="tower", weight=1.0)),
    22: ("leak of questions", "NothingNew", partial(leak, name="leak", within_answer=False)),
    26: ("leak of questions within answers", "NothingNew", partial(leak, name="quiz", within_answer=True)),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
