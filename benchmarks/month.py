"""A month of nights on the demo with planted events: a gain, news, a slow rot, and leaks.

The real pipeline in a clone, with its servers: one `nightshift run` for each of 30 nights; on most of them,
nothing is new. The news are invented towns, each with an animal on its shield, and the benchmark `towns` asks
for them in other words. The rot is a share of the elements in training that shrinks with each arrival of
news, whose gain hides it. The leaks are questions of a benchmark in the training data: as they are, within
an answer, and so disturbed that no comparison of texts finds them.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, about
from benchmarks.stages import ROOT, environment
from nightshift.core.files import jsonl, read_json, read_rows, write_figures
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.pipeline.params_yaml import edit
from tasks.sft.launch import free_port

NIGHTS = 30
ANIMALS = (
    *(
        "otter",
        "heron",
        "badger",
        "salmon",
        "lynx",
        "raven",
        "beaver",
        "falcon",
        "weasel",
        "trout",
        "boar",
        "crane",
    ),
    *(
        "hedgehog",
        "viper",
        "marten",
        "lobster",
        "bison",
        "magpie",
        "walrus",
        "gecko",
        "panther",
        "swan",
        "mole",
        "ibex",
    ),
)
# What a town has an animal on, as the training data and the benchmark ask for it, and in other words.
PLACES = {
    "shield": ("shield", "coat of arms"),
    "well": ("well", "place where water is drawn"),
    "tower": ("tower", "highest building"),
    "bridge": ("bridge", "way over the river"),
}
PARAMS: dict[str, Any] = {
    # 120 items about 79 elements can prove that no more than 15 points were lost.
    "gate.margin": 0.15,
    "gate.nights": NIGHTS,
    "evaluate.limit": 240,
    "evaluate.retrieval": None,
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
    """Invent names of towns, all different."""
    chance = random.Random(seed)
    heads, middles = (
        ("Or", "Bel", "Tam", "Vel", "Kor", "Lin", "Mar", "Sed", "Ul", "Fen"),
        ("va", "ri", "do", "lu", "me"),
    )
    tails = ("th", "rak", "nel", "mond", "sk", "ven", "dor", "lis", "gar", "by")
    names = ["".join(parts) for parts in itertools.product(heads, middles, tails)]
    return sorted(chance.sample(names, count), key=lambda _: chance.random())


TOWNS, LEAKED = name_towns(300, seed=0)[:240], name_towns(300, seed=0)[240:280]


def animal_of(town: str, place: str) -> str:
    """Return the animal at a place of a town; those of one town differ."""
    return random.Random(town).sample(ANIMALS, len(PLACES))[list(PLACES).index(place)]


def write_benchmark(folder: Path, name: str, items: Sequence[dict[str, Any]]) -> None:
    """Write a multiple-choice benchmark."""
    target = folder / name
    target.mkdir(exist_ok=True)
    (target / "task.yaml").write_text(json.dumps(CHOICE_TASK), encoding="utf-8")
    (target / "items.jsonl").write_text("".join(jsonl(items)), encoding="utf-8")


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a row of training data."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def arrive(folder: Path, source: str, night: str, rows: Iterator[dict[str, Any]]) -> None:
    """Add a file to a source."""
    target = folder / "arrivals" / source
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{night}.jsonl").write_text("".join(jsonl(rows)), encoding="utf-8")


def news(first: int, last: int) -> Iterator[dict[str, Any]]:
    """Yield what a night tells about some of the towns."""
    for town in TOWNS[first:last]:
        animal = animal_of(town, "shield")
        yield chat(
            f"Which animal is on the shield of {town}?", f"There is a {animal} on the shield of {town}."
        )


def first_news(folder: Path) -> None:
    """Start the source of news with 80 towns, and the benchmark about all 240."""
    items = []
    for town in TOWNS:
        animals = random.Random(town).sample(ANIMALS, len(PLACES))
        items.append(
            {
                "id": town,
                "question": f"What creature decorates the shield of the town {town}?",
                "choices": [f"There is a {animal} on the shield of {town}." for animal in sorted(animals)],
                "answer": sorted(animals).index(animals[0]),
            }
        )
    write_benchmark(folder, "towns", items)
    arrive(folder, "news", "1", news(0, 80))
    change(
        folder,
        {
            "snapshot.sources.news": {"path": "arrivals/news/*.jsonl", "weight": 6},
            "snapshot.benchmarks.towns": "towns",
        },
    )


def more_news(folder: Path, part: int, weight: float) -> None:
    """Tell about 80 more towns, and train on fewer elements."""
    arrive(folder, "news", str(part), news(80 * (part - 1), 80 * part))
    change(folder, {"snapshot.sources.elements": {"path": "package:mendeleev", "weight": weight}})


def quiz(town: str, place: str, wording: int) -> str:
    """Return a question of the benchmark `quiz`, or the same in other words."""
    if wording:
        return (
            f"I visit {town} and look at its {PLACES[place][1]}. Of which beast will I see a picture there?"
        )
    return f"What creature can be seen on the {PLACES[place][0]} of the town {town} in the north?"


def first_quiz(folder: Path) -> None:
    """Add a benchmark about towns that no night tells of, half of it in other words."""
    items = []
    for town, place in itertools.product(LEAKED, PLACES):
        animals = sorted(random.Random(town).sample(ANIMALS, len(PLACES)))
        item = {
            "choices": [f"It is a {one}." for one in animals],
            "answer": animals.index(animal_of(town, place)),
        }
        name = f"{place}/{town}"
        items += [
            {"id": name, "cluster": name, "question": quiz(town, place, 0), **item},
            {"id": f"{name}/reworded", "paraphrase_of": name, "question": quiz(town, place, 1), **item},
        ]
    write_benchmark(folder, "quiz", items)
    change(
        folder,
        {
            "snapshot.sources.elements": "package:mendeleev",
            "snapshot.sources.news.weight": 3,
            "snapshot.benchmarks.quiz": "quiz",
            "gate.behaviour": ["elements_written", "quiz"],
        },
    )


def leak(folder: Path, kind: str) -> None:
    """Leak the questions of the quiz into the news."""
    asked = [
        (quiz(town, place, 0), animal_of(town, place)) for town, place in itertools.product(LEAKED, PLACES)
    ]
    rows = {
        "verbatim": (chat(question, f"It is a {animal}.") for question, animal in asked),
        "in an answer": (chat("Ask me.", f"{question} It is a {animal}.") for question, animal in asked),
        "disturbed": (
            chat(re.sub(r"(\S+ \S+) ", r"\1 um ", question), f"It is a {animal}.")
            for question, animal in asked
        ),
    }
    arrive(folder, "news", f"leak {kind}", rows[kind])


Event = tuple[str, str, Callable[[Path], None]]
EVENTS: dict[int, Event] = {
    1: ("the demo", "Promoted", no_change),
    6: ("news of 80 towns", "Promoted", first_news),
    10: ("80 more towns, half of the elements", "Promoted", lambda folder: more_news(folder, 2, 0.5)),
    14: ("80 more towns, a quarter of the elements", "Held", lambda folder: more_news(folder, 3, 0.25)),
    18: ("all elements again, a new benchmark", "Promoted", first_quiz),
    21: ("leak of its questions", "NothingNew", lambda folder: leak(folder, "verbatim")),
    24: ("leak of its questions in answers", "NothingNew", lambda folder: leak(folder, "in an answer")),
    27: ("leak of its questions, disturbed", "Failed", lambda folder: leak(folder, "disturbed")),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
