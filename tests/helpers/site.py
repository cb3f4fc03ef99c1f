"""A checkout with a running stack and a DVC remote, for programs that do things to it: chaos and soak."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import yaml

from infra.local import processes
from nightshift.core.errors import StageError
from nightshift.core.paths import MODEL, PACKED, SCORES
from nightshift.core.ports import free_port
from nightshift.pipeline.graph import parse_outputs
from tests.helpers.checkouts import BIN, ROOT, ServedCheckout, make_checkout
from tests.helpers.processes import command_line
from tests.helpers.remote import Remote
from tests.helpers.small_base import make_small_base

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
# Size of the disk of the state folder, in MiB.
DISK = 2048
# A run that has not ended after this many seconds hangs.
HANGING = 600
# How long a victim of a fault is waited for, in seconds.
PATIENCE = 45.0
# Outputs that say what was trained, and how it was judged.
COMPARED = tuple(path.as_posix() for path in (PACKED, MODEL, SCORES))


class NoVictimError(Exception):
    """The run in progress never had what a fault breaks."""


class Site:
    """A checkout with a running stack, and what chooses the moments of faults.

    Attributes:
        checkout: The checkout.
        home: State folder, a disk of its own if one can be mounted.
        remote: DVC remote of the checkout.
        rng: Chooses moments, victims and lengths.
        longest: Length of a fault that lasts, in seconds, at most.
        run: Id of the run that was started last.
    """

    def __init__(
        self, checkout: ServedCheckout, home: Path, remote: Remote, rng: Random, longest: float
    ) -> None:
        self.checkout, self.home, self.remote, self.rng, self.longest = checkout, home, remote, rng, longest
        self.run = ""
        self._deployment = self.find_deployment("finetune", "prod")

    def find_deployment(self, flow: str, name: str) -> str:
        """Return the id of a deployment."""
        named = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}}
        (deployment,) = self.api("/deployments/filter", named)
        return str(deployment["id"])

    def api(self, path: str, body: Mapping[str, Any]) -> Any:
        """Call Prefect's server, until it is there."""
        deadline = time.monotonic() + HANGING
        while True:
            try:
                return self.checkout.api(path, dict(body))
            except (StageError, OSError, KeyError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def start(self, overrides: Mapping[str, Any]) -> str:
        """Start a run of the deployment `finetune/prod`, and return its id."""
        path = f"/deployments/{self._deployment}/create_flow_run"
        self.run = str(self.api(path, {"parameters": {"overrides": dict(overrides)}})["id"])
        return self.run

    def wait(self, run: str) -> str:
        """Wait for the end of a run, and return the type of its state; `HANGING` if it does not end."""
        deadline = time.monotonic() + HANGING
        while time.monotonic() < deadline:
            (found,) = self.api("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            if found["state_type"] in FINAL:
                return str(found["state_type"])
            time.sleep(0.5)
        return "HANGING"

    def complete(self, overrides: Mapping[str, Any], fault: Callable[["Site"], Any] | None) -> dict[str, Any]:
        """Run until a run completes, three times at most; the first one meets the fault.

        Returns:
            Whether the fault was planted, the state of each run, the seconds from the end of its cause to the
            completed run, and what is left of the runs.
        """
        first, is_planted = self.start(overrides), fault is not None
        if fault:
            try:
                with fault(self):
                    pass
            except NoVictimError:
                is_planted = False
        ended = time.monotonic()
        states = [self.wait(first)]
        while states[-1] != "COMPLETED" and len(states) < 3:
            states.append(self.wait(self.start(overrides)))
        seconds = round(time.monotonic() - ended, 1)
        return {"is_planted": is_planted, "states": states, "seconds": seconds, "left": self.leftovers()}

    def outputs(self) -> dict[str, str]:
        """Return output -> MD5 of what the last run has published; empty if it has not."""
        git = partial(self.checkout.type, "git")
        branch = git("for-each-ref", "--format=%(refname)", f"refs/heads/runs/*-{self.run[:8]}").strip()
        stages = parse_outputs(git("show", f"{branch}:dvc.lock")) if branch else {}
        return {path: md5 for outs in stages.values() for path, md5 in outs.items()}

    def digests(self) -> dict[str, str]:
        """Return those of the outputs that say what was trained, and how it was judged."""
        return {path: md5 for path, md5 in self.outputs().items() if path in COMPARED}

    def leftovers(self) -> list[str]:
        """Return the processes that are left of ended runs, after some seconds."""
        deadline = time.monotonic() + 15
        while (left := self._orphans()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left

    def _orphans(self) -> list[str]:
        """Return the command lines of the processes that belong to no service."""
        services = {record["pid"] for record in processes.read_records(self.home).values()}
        found = []
        for process in stack_processes(self.home):
            with suppress(psutil.Error):
                is_of_run = "PREFECT__FLOW_RUN_ID" in process.environ()
                if is_of_run or os.getsid(process.pid) not in services:
                    found.append(" ".join(process.cmdline())[:200])
        return found

    def processes(self, part: str) -> list[psutil.Process]:
        """Return the processes of the stack and its runs whose command line has a part."""
        return [one for one in stack_processes(self.home) if part in " ".join(command_line(one))]

    def wait_for(self, part: str) -> psutil.Process:
        """Wait for such processes, then for a moment, and return one of them.

        Raises:
            NoVictimError: There was none.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.processes(part):
                time.sleep(self.rng.uniform(0, 2))
                if found := self.processes(part):
                    return self.rng.choice(found)
            time.sleep(0.1)
        raise NoVictimError(part)

    def pause(self) -> float:
        """Return the length of a fault that lasts, in seconds."""
        return self.rng.uniform(0.2, 1.0) * self.longest


@contextmanager
def running_site(
    folder: Path, rng: Random, longest: float, changes: Mapping[str, Any] | None = None
) -> Iterator[Site]:
    """Create a checkout with a running stack in a new folder; end the stack.

    Args:
        folder: Folder of checkout, base, remote and, afterwards, the logs.
        rng: Chooses the moments of faults.
        longest: Length of a fault that lasts, in seconds, at most.
        changes: Parameters, `section.key` -> value, instead of those of `make_checkout`.
    """
    home = folder / "state"
    home.mkdir(parents=True)
    if may_mount(home):
        mount("-t", "tmpfs", "-o", f"size={DISK}m", "none", str(home))
    remote = Remote(folder / "remote")
    made = make_checkout(folder / "checkout", make_small_base(folder / "base"))
    change_params(made / "params.yaml", changes or {})
    checkout = ServedCheckout(made, environment(home))
    (made / ".dvc" / "cache").mkdir()
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
        if os.path.ismount(home):
            subprocess.run(["umount", "--lazy", home], check=True)


def change_params(file: Path, changes: Mapping[str, Any]) -> None:
    """Change values of a params.yaml."""
    params = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        section, name = key.split(".", 1)
        params[section][name] = value
    file.write_text(yaml.safe_dump(params))


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a new user's shell, with a state folder and free ports."""
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    ports = {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    ours = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "NIGHTSHIFT_HOME": str(home),
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".nightshift" / "torch-extensions"),
        "HF_HUB_OFFLINE": "1",
    }
    return kept | ports | ours


def stack_processes(home: Path) -> list[psutil.Process]:
    """Return every process of a stack and of its runs, at any depth."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("NIGHTSHIFT_HOME") == str(home):
                found.append(process)
    return found


def mount(*arguments: str) -> None:
    """Call mount, which root may."""
    subprocess.run(["mount", *arguments], check=True)


def may_mount(folder: Path) -> bool:
    """Return whether this process may mount disks."""
    if os.geteuid():
        return False
    try_one = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    if subprocess.run(try_one, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", folder], check=True)
    return True
