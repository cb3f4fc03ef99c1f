"""Plant faults into real nights, and check what the next ones do: `make chaos`.

A checkout with a small model, its servers, and a DVC remote. Each night trains the same model anew, since a
parameter changes that has no effect on the result, and each meets one fault of `tests.helpers.faults`, all
kinds equally often. If a night does not complete, it is started again, as a user would do. For each:

- a run has completed at most `--within` seconds after the cause of the fault ended;
- its results have the digests of a night without faults;
- no process of a run is left.

The results are written after each fault. The seed decides the order; moments and victims also depend on the
speed of the machine.
"""

import argparse
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.record import record, require_bounds, write_records
from nightshift.core.errors import StageError
from nightshift.core.stage import run_main
from tests.helpers.faults import FAULTS, MOUNTED
from tests.helpers.site import Site, running_site

# Changes the key of a training, but nothing that it computes.
HARMLESS = "sft.loss_watchdog_threshold"
log = logging.getLogger(__name__)


def main(
    *, folder: Path, faults: int, seed: int, longest: float, within: float, only: list[str], out: Path | None
) -> None:
    """Plant faults, and write the results."""
    if unknown := sorted(set(only) - set(FAULTS)):
        raise StageError(f"no such faults: {', '.join(unknown)}; known: {', '.join(FAULTS)}")
    kinds = [kind for kind in FAULTS if not only or kind in only]
    with running_site(folder.absolute(), Random(seed), longest) as site:
        if not os.path.ismount(site.home):
            log.warning("disks cannot be mounted here, so these are left out: %s", "; ".join(MOUNTED))
            kinds = [kind for kind in kinds if kind not in MOUNTED]
        expected = run_undisturbed(site)
        results: list[dict[str, Any]] = []
        for number, kind in enumerate(in_order(kinds, faults, Random(seed)), start=1):
            result = {"kind": kind, **site.complete(change(number), FAULTS[kind])}
            result["is_equal"] = result["states"][-1] == "COMPLETED" and site.digests() == expected
            results.append(result)
            log.info("%d/%d %s: %s", number, faults, kind, describe(result))
            write_records("chaos", summarize(results, seed, within), ("prefect", "mlflow", "dvc"), out)
    require_bounds(summarize(results, seed, within))


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the command-line arguments."""
    parser.add_argument("folder", type=Path, help="new folder of the checkout; it stays")
    parser.add_argument("--faults", type=int, default=300, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order, the moments and the victims")
    parser.add_argument("--longest", type=float, default=20, help="seconds that a fault lasts at most")
    parser.add_argument("--within", type=float, default=120, help="seconds until a night has completed")
    parser.add_argument("--only", action="append", default=[], help="kind of fault to plant; repeatable")
    parser.add_argument("--out", type=Path, default=None, help="folder of chaos.json")


def in_order(kinds: list[str], count: int, rng: Random) -> Iterator[str]:
    """Yield kinds, each as often as the others, in random order."""
    order: list[str] = []
    for _ in range(count):
        order = order or rng.sample(kinds, len(kinds))
        yield order.pop()


def change(number: int) -> dict[str, float]:
    """Return the override of a night."""
    return {HARMLESS: 1000.0 + number}


def run_undisturbed(site: Site) -> dict[str, str]:
    """Run two nights without a fault, and return the digests of their results.

    Raises:
        StageError: One did not complete, or they differ.
    """
    digests = []
    for number in (-1, 0):
        done = site.complete(change(number), None)
        if done["states"] != ["COMPLETED"]:
            raise StageError(f"{site.checkout.folder}: a night without a fault ended as {done['states']}")
        digests.append(site.digests())
    first, second = digests
    if first != second or not first:
        raise StageError(f"two nights without a fault differ: {first}, {second}")
    return first


def describe(result: dict[str, Any]) -> str:
    """Describe the result of one fault in a line."""
    states = ", then ".join(result["states"]).lower()
    planted = "" if result["is_planted"] else "not planted; "
    equal = "" if result["is_equal"] else "; other results"
    left = f"; left: {'; '.join(result['left'])}" if result["left"] else ""
    return f"{planted}{states}, {result['seconds']:.0f} s after its end{equal}{left}"


def summarize(results: list[dict[str, Any]], seed: int, within: float) -> list[dict[str, Any]]:
    """Return the records of all faults so far."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if result["is_planted"]:
            kinds[result["kind"]].append(result)
    planted = [one for found in kinds.values() for one in found]
    failed = sum(one["states"][-1] != "COMPLETED" for one in planted)
    other = sum(not one["is_equal"] for one in planted)
    left = sum(len(one["left"]) for one in planted)
    slowest = max((one["seconds"] for one in planted), default=0.0)
    by_kind = {kind: summarize_kind(found) for kind, found in sorted(kinds.items())}
    return [
        record("faults planted", len(planted), "faults", seed=seed, kinds=by_kind),
        record("kinds of faults", len(kinds), "kinds"),
        record("nights that never completed", failed, "nights", at_most=0),
        record("nights with other results", other, "nights", at_most=0),
        record("processes left behind", left, "processes", at_most=0),
        record("longest time to a completed night", slowest, "s", at_most=within),
    ]


def summarize_kind(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how often a night completed without a second start, and the seconds until one completed."""
    seconds = [one["seconds"] for one in found]
    at_once = sum(len(one["states"]) == 1 for one in found)
    return {"faults": len(found), "at_once": at_once, "median": median(seconds), "longest": max(seconds)}


if __name__ == "__main__":
    run_main(main, declare)
