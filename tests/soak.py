"""Run a month of nights with growing data and faults: `make soak`.

Each night, a file of new examples arrives, and every third night meets a fault of `tests.helpers.faults`. A
day passes between two nights: whatever is on the disk becomes a day older, and the janitor runs. At the end:

- every night has completed, and has read all examples that had arrived;
- the disk holds at most 1.2 times what the branches and versions need that are kept;
- each run has sent one message.
"""

import argparse
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.record import record, require_bounds, write_records
from infra.local.stack import read_stack
from nightshift.core.files import read_json
from nightshift.core.paths import DATA
from nightshift.core.stage import run_main
from nightshift.core.state import ARTIFACTS
from nightshift.pipeline.dvc_cache import listing
from nightshift.pipeline.graph import parse_outputs
from tests.helpers.faults import FAULTS, MOUNTED
from tests.helpers.site import Site, running_site
from tests.helpers.webhook import create_webhook, receiving

# Examples that arrive each night.
ARRIVING = 40
KEEP_RUNS = 5
PARAMS = {
    "snapshot.sources": {"elements": "package:mendeleev", "mine": "arrivals/*.jsonl"},
    "nightly.keep_runs": KEEP_RUNS,
    "nightly.notify": ["custom-webhook/soak"],
}
DAY = 86_400
# The address of a run in a message.
ABOUT = re.compile(r"/runs/flow-run/([0-9a-f-]{36})")
# Folders of the state folder whose files the janitor removes by their age.
AGING = ("bases", "checkpoints", "memo", "reproduce", "workspaces")
log = logging.getLogger(__name__)


def main(*, folder: Path, nights: int, seed: int, longest: float, out: Path | None) -> None:
    """Run the nights, and write the results."""
    begun, rng = time.monotonic(), Random(seed)
    (folder / "checkout" / "arrivals").mkdir(parents=True)
    found: list[dict[str, Any]] = []
    with running_site(folder.absolute(), rng, longest, PARAMS) as site, listening(site) as messages:
        kinds = [kind for kind in FAULTS if os.path.ismount(site.home) or kind not in MOUNTED]
        order = rng.sample(kinds, len(kinds))
        for night in range(1, nights + 1):
            arrive(site.checkout.folder / "arrivals" / f"{night:03d}.jsonl", night)
            kind = order[night // 3 % len(order)] if night % 3 == 0 else None
            done = site.complete({}, FAULTS[kind] if kind else None)
            read = rows_read(site)
            pass_a_day(site)
            found.append({"night": night, "kind": kind, **done, "read": read, "disk": measure_disk(site)})
            log.info("night %d: %s", night, json.dumps(found[-1]))
        # The last messages are on their way.
        time.sleep(20)
        sent = Counter(run for message in messages for run in ABOUT.findall(message))
        runs = {run["id"] for run in ended_runs(site)}
    minutes = (time.monotonic() - begun) / 60
    records = summarize(found, minutes, {run: sent[run] for run in runs})
    write_records("soak", records, ("prefect", "mlflow", "dvc"), out)
    require_bounds(records)


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the command-line arguments."""
    parser.add_argument("folder", type=Path, help="new folder of the checkout; it stays")
    parser.add_argument("--nights", type=int, default=30, help="number of nights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults, their moments and victims")
    parser.add_argument("--longest", type=float, default=20, help="seconds that a fault lasts at most")
    parser.add_argument("--out", type=Path, default=None, help="folder of soak.json")


def arrive(file: Path, night: int) -> None:
    """Write the examples of a night."""
    turns = [
        (
            {"role": "user", "content": f"Where is parcel {night}-{number}?"},
            {"role": "assistant", "content": f"Parcel {night}-{number} is on shelf {(night * number) % 89}."},
        )
        for number in range(ARRIVING)
    ]
    file.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))


@contextmanager
def listening(site: Site) -> Iterator[list[str]]:
    """Let each run send a message; yield the list of those that have arrived."""
    with receiving() as (url, bodies):
        create_webhook(read_stack(site.home), "soak", url)
        site.checkout.type("nightshift", "up")
        yield bodies


def rows_read(site: Site) -> int:
    """Return the rows that the last run has read, by the record of ingest in DVC's cache; 0 if it failed."""
    oid = site.outputs().get((DATA / "ingest" / "summary.json").as_posix())
    return int(read_json(place(site, oid))["rows_in"]) if oid else 0


def place(site: Site, oid: str) -> Path:
    """Return the path of an object in DVC's cache."""
    return site.checkout.folder / ".dvc" / "cache" / "files" / "md5" / oid[:2] / oid[2:]


def pass_a_day(site: Site) -> None:
    """Let what is on the disk become a day older, and run the janitor."""
    for folder in (site.checkout.folder / ".dvc" / "cache", *map(site.home.joinpath, AGING)):
        for path in (folder, *folder.rglob("*")):
            if path.exists():
                moment = path.stat().st_mtime - DAY
                os.utime(path, (moment, moment))
    deployment = site.find_deployment("janitor", "local")
    run = site.api(f"/deployments/{deployment}/create_flow_run", {})["id"]
    assert site.wait(run) == "COMPLETED"


def measure_disk(site: Site) -> dict[str, int]:
    """Return the bytes that are used, and those that the kept branches and versions need.

    Databases and logs are left out: they have their own limits.
    """
    used = sum(
        map(size, (site.checkout.folder / ".dvc" / "cache" / "files", *map(site.home.joinpath, AGING)))
    )
    artifacts = size(site.home / ARTIFACTS)
    git = site.checkout.type
    branches = git("git", "for-each-ref", "--sort=-committerdate", "--format=%(refname)", "refs/heads/runs")
    needed: set[str] = set()
    for number, branch in enumerate(branches.splitlines()):
        lock = parse_outputs(git("git", "show", f"{branch}:dvc.lock"))
        stages = lock if number < KEEP_RUNS else {"snapshot": lock["snapshot"]}
        needed.update(oid for outs in stages.values() for oid in outs.values())
    for oid in list(needed):
        needed |= listing(place(site, oid))
    objects = sum(place(site, oid).stat().st_size for oid in needed if place(site, oid).is_file())
    return {"used": used + artifacts, "needed": objects + size(site.home / "bases") + artifacts}


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def ended_runs(site: Site) -> list[dict[str, Any]]:
    """Return the runs of the deployment that have begun and ended."""
    body = {"deployments": {"name": {"any_": ["prod"]}}, "flows": {"name": {"any_": ["finetune"]}}}
    found: list[dict[str, Any]] = site.api("/flow_runs/filter", body)
    return found


def summarize(nights: list[dict[str, Any]], minutes: float, messages: dict[str, int]) -> list[dict[str, Any]]:
    """Return the records of the month."""
    first, last = nights[0], nights[-1]
    incomplete = sum(night["states"][-1] != "COMPLETED" for night in nights)
    missing = sum(
        first["read"] + ARRIVING * (night["night"] - first["night"]) - night["read"] for night in nights
    )
    left = sum(len(night["left"]) for night in nights)
    silent = sum(not number for number in messages.values())
    several = sum(number > 1 for number in messages.values())
    ratio = last["disk"]["used"] / last["disk"]["needed"]
    return [
        record("nights that did not complete", incomplete, "nights", at_most=0, nights=nights),
        record("examples that were not read", missing, "examples", at_most=0),
        record("processes left behind", left, "processes", at_most=0),
        record("disk used / needed", ratio, "ratio", at_most=1.2),
        record("runs without a message", silent, "runs", at_most=0),
        record("runs with several messages", several, "runs", at_most=0),
        record("duration", minutes, "minutes", at_most=45),
    ]


if __name__ == "__main__":
    run_main(main, declare)
