"""Plant faults into real nights, and check what the next ones do: `make chaos`.

A checkout with a small model, its servers, and a DVC remote. Each night trains the same model anew, since a
parameter changes that has no effect on the result, and each meets one fault of `tests.helpers.faults`, in
random order. If the night does not complete, it is started again, as a user would do. At the end of each:

- a run has completed, at most `--within` seconds after the cause of the fault ended (but for a fault that
  ends before, not earlier than a night takes);
- its results have the digests of a night without faults;
- the queue is empty, and no process of a run is left.

The results are written after each fault. With one `--seed`, the kinds come in one order; moments and victims
are random within the same bounds.
"""

import argparse
import logging
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil
import yaml

from benchmarks.record import record, require_bounds, write_records
from infra.local import processes
from nightshift.core.errors import StageError
from nightshift.core.paths import MODEL, PACKED, SCORES
from nightshift.core.ports import free_port
from nightshift.core.stage import run_main
from tests.helpers.checkouts import BIN, ROOT, ServedCheckout, make_checkout
from tests.helpers.faults import FAULTS, MOUNTED, NoVictimError, Site, may_mount, mount, stack_processes
from tests.helpers.remote import Remote
from tests.helpers.small_base import make_small_base

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
# Changes the key of a training, but nothing that it computes.
HARMLESS = "sft.loss_watchdog_threshold"
# Size of the disk of the state folder, in MiB.
DISK = 2048
# A run that has not ended after this many seconds hangs.
HANGING = 600
# Outputs that are the same in every night; the others name the parameter that changes.
COMPARED = tuple(path.as_posix() for path in (PACKED, MODEL, SCORES))
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
        nights = Nights(site)
        expected = nights.run_undisturbed()
        results: list[dict[str, Any]] = []
        for number, kind in enumerate(in_order(kinds, faults, Random(seed)), start=1):
            result = {"kind": kind, **nights.run_with(kind, expected)}
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


@contextmanager
def running_site(folder: Path, rng: Random, longest: float) -> Iterator[Site]:
    """Create a checkout with a running stack; end it."""
    home, cache = folder / "state", folder / "checkout" / ".dvc" / "cache"
    home.mkdir(parents=True)
    mounted = may_mount(home)
    if mounted:
        mount("-t", "tmpfs", "-o", f"size={DISK}m", "none", str(home))
    remote = Remote(folder / "remote")
    checkout = ServedCheckout(
        make_checkout(folder / "checkout", make_small_base(folder / "base")), environment(home)
    )
    cache.mkdir()
    for option, value in (("url", remote.url), ("method", "PUT"), ("verify", "true")):
        checkout.type("dvc", "remote", "modify", "--local", "storage", option, value)
    try:
        checkout.type("nightshift", "up")
        yield Site(checkout, home, remote, rng, longest)
    finally:
        with suppress(AssertionError):
            checkout.type("nightshift", "down")
        for process in stack_processes(home):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        remote.close()
        shutil.copytree(home / "logs", folder / "logs")
        if mounted:
            subprocess.run(["umount", "--lazy", home], check=True)


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a new user's shell, with a state folder and free ports."""
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    ports = {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    return (
        kept
        | ports
        | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "NIGHTSHIFT_HOME": str(home),
            "TORCH_EXTENSIONS_DIR": str(ROOT / ".nightshift" / "torch-extensions"),
            "HF_HUB_OFFLINE": "1",
        }
    )


class Nights:
    """The runs of a checkout."""

    def __init__(self, site: Site) -> None:
        self.site, self.number, self.run = site, 0, ""
        site.run = lambda: self.run
        named = {"flows": {"name": {"any_": ["finetune"]}}, "deployments": {"name": {"any_": ["prod"]}}}
        (deployment,) = self.api("/deployments/filter", named)
        self.deployment = deployment["id"]

    def api(self, path: str, body: dict[str, Any]) -> Any:
        """Call Prefect's server, until it is there."""
        deadline = time.monotonic() + HANGING
        while True:
            try:
                return self.site.checkout.api(path, body)
            except (StageError, OSError, KeyError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def start(self) -> str:
        """Start a run with the parameter of the current night."""
        parameters = {"overrides": {HARMLESS: 1000.0 + self.number}}
        path = f"/deployments/{self.deployment}/create_flow_run"
        self.run = str(self.api(path, {"parameters": parameters})["id"])
        return self.run

    def state_of(self, run: str) -> tuple[str, str]:
        """Return type and name of a run's state."""
        (found,) = self.api("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return found["state_type"], found["state_name"]

    def wait(self, run: str) -> str:
        """Wait for the end of a run, and return the type of its state; `HANGING` if it does not end."""
        deadline = time.monotonic() + HANGING
        while time.monotonic() < deadline:
            state, _ = self.state_of(run)
            if state in FINAL:
                return state
            time.sleep(0.5)
        return "HANGING"

    def run_undisturbed(self) -> dict[str, str]:
        """Run two nights without a fault, and return the digests of their results."""
        digests = []
        for _ in range(2):
            self.number += 1
            state = self.wait(self.start())
            if state != "COMPLETED":
                raise StageError(f"{self.site.checkout.folder}: a night without a fault ended as {state}")
            digests.append(self.digests(self.run))
        first, second = digests
        if first != second or not first:
            raise StageError(f"two nights without a fault differ: {first}, {second}")
        return first

    def digests(self, run: str) -> dict[str, str]:
        """Return output -> MD5 of the results that a run has published."""
        git = partial(self.site.checkout.type, "git")
        branch = git("for-each-ref", "--format=%(refname)", f"refs/heads/runs/*-{run[:8]}").strip()
        if not branch:
            return {}
        lock = yaml.safe_load(git("show", f"{branch}:dvc.lock"))
        outputs = [out for stage in lock["stages"].values() for out in stage["outs"]]
        return {out["path"]: out["md5"] for out in outputs if out["path"] in COMPARED}

    def run_with(self, kind: str, expected: dict[str, str]) -> dict[str, Any]:
        """Run a night with a fault, and return what came of it."""
        self.number += 1
        first = self.start()
        try:
            with FAULTS[kind](self.site):
                pass
            is_planted = True
        except NoVictimError:
            is_planted = False
        ended = time.monotonic()
        states = [self.wait(first)]
        while states[-1] != "COMPLETED" and len(states) < 3:
            states.append(self.wait(self.start()))
        seconds = time.monotonic() - ended
        return {
            "is_planted": is_planted,
            "states": states,
            "seconds": round(seconds, 1),
            "is_equal": states[-1] == "COMPLETED" and self.digests(self.run) == expected,
            "left": self.leftovers(),
        }

    def leftovers(self) -> list[str]:
        """Return what is left of ended runs: processes, after some seconds, and runs that hold a slot."""
        deadline = time.monotonic() + 15
        while left := self.orphans():
            if time.monotonic() > deadline:
                return left
            time.sleep(0.5)
        return []

    def orphans(self) -> list[str]:
        """Return the command lines of the processes that belong to no service."""
        services = {record["pid"] for record in processes.read_records(self.site.home).values()}
        found = []
        for process in stack_processes(self.site.home):
            with suppress(psutil.Error):
                is_of_run = "PREFECT__FLOW_RUN_ID" in process.environ()
                if is_of_run or os.getsid(process.pid) not in services:
                    found.append(" ".join(process.cmdline())[:200])
        return found


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
