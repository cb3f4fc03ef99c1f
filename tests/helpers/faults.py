"""Faults that a night may meet: of its processes, the disk, the databases, the cache and the remote.

`FAULTS` has a context manager for each kind. It waits for its moment in the run in progress, plants the
fault, and ends its cause on exit; what the fault has broken stays broken.
"""

import contextlib
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from random import Random

import psutil

from tests.helpers.site import PATIENCE, NoVictimError, Site, mount, stack_processes

# Services and the processes of a run, by a part of their command line.
SERVICES = {
    "the worker": "worker start",
    "MLflow": "mlflow server",
    "Prefect": "infra.local.prefect_server",
    "the keeper": "infra.local.keeper",
}
RUN = {
    "the flow": "prefect.engine",
    "a supervisor": "supervise.py",
    "DVC": "dvc repro",
    "a stage": "python -m tasks.",
    "the launcher": "deepspeed.launcher",
    "a rank": "tasks.sft.worker",
}


@contextmanager
def send(site: Site, *, part: str, number: int) -> Iterator[None]:
    """Send a signal to a process."""
    victim = site.wait_for(part)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.send_signal(number)
    yield
    # Without an init system, nothing keeps the keeper but the next `nightshift up`.
    if part == SERVICES["the keeper"]:
        site.checkout.type("nightshift", "up")


@contextmanager
def stop(site: Site, *, part: str) -> Iterator[None]:
    """Stop a process for some time, as a machine does that swaps."""
    victim = site.wait_for(part)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.suspend()
        time.sleep(site.pause())
    yield
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.resume()


@contextmanager
def cancel(site: Site) -> Iterator[None]:
    """Cancel the run, as the button in Prefect's page does."""
    site.wait_for(RUN["a stage"])
    body = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    site.api(f"/flow_runs/{site.run}/set_state", body)
    yield


@contextmanager
def reboot(site: Site) -> Iterator[None]:
    """Kill everything at once; then start the stack, as the unit of systemd does."""
    site.wait_for(RUN["a stage"])
    for process in stack_processes(site.home):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    yield
    site.checkout.type("nightshift", "up")


@contextmanager
def restart(site: Site) -> Iterator[None]:
    """Stop the stack and start it again, as for an update."""
    site.wait_for(RUN["a stage"])
    site.checkout.type("nightshift", "down")
    yield
    site.checkout.type("nightshift", "up")


@contextmanager
def servers_away(site: Site) -> Iterator[None]:
    """Kill the keeper and both servers, and start them again after some time."""
    site.wait_for(RUN["a stage"])
    for name in ("the keeper", "MLflow", "Prefect"):
        for process in site.processes(SERVICES[name]):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    time.sleep(site.pause())
    yield
    site.checkout.type("nightshift", "up")


@contextmanager
def full_disk(site: Site) -> Iterator[None]:
    """Fill the disk of the state folder."""
    site.wait_for(RUN["a stage"])
    filler = site.home / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    time.sleep(site.pause())
    yield
    filler.unlink()


@contextmanager
def read_only_cache(site: Site) -> Iterator[None]:
    """Make DVC's cache read-only, as a disk with errors becomes."""
    site.wait_for(RUN["a stage"])
    cache = site.checkout.folder / ".dvc" / "cache"
    mount("--bind", str(cache), str(cache))
    try:
        mount("--options", "remount,ro,bind", str(cache))
        time.sleep(site.pause())
        yield
    finally:
        subprocess.run(["umount", "--lazy", cache], check=True)


@contextmanager
def locked_database(site: Site, *, file: str) -> Iterator[None]:
    """Lock a database of SQLite for some time."""
    site.wait_for(RUN["a stage"])
    database = sqlite3.connect(site.home / file, timeout=30, isolation_level=None)
    try:
        with contextlib.suppress(sqlite3.OperationalError):
            database.execute("BEGIN EXCLUSIVE")
        time.sleep(site.pause())
        yield
    finally:
        database.close()


@contextmanager
def damaged_files(site: Site, *, folder: str, pattern: str) -> Iterator[None]:
    """Flip a byte in each of some files below a folder, without a change of their size."""
    site.wait_for(RUN["a stage"])
    files = [path for path in (site.checkout.folder / folder).rglob(pattern) if path.is_file()]
    if not files:
        raise NoVictimError(folder)
    for path in site.rng.sample(files, min(len(files), 5)):
        flip_byte(path, site.rng)
    yield


@contextmanager
def damaged_checkpoint(site: Site) -> Iterator[None]:
    """Kill training after a checkpoint, and flip a byte in it."""
    victim = site.wait_for(RUN["a rank"])
    deadline = time.monotonic() + PATIENCE
    while not (files := list((site.home / "checkpoints").glob("*/checkpoint-*/*"))):
        if time.monotonic() > deadline:
            raise NoVictimError("a checkpoint")
        time.sleep(0.05)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    newest = max(files, key=lambda path: path.parent.stat().st_mtime)
    flip_byte(site.rng.choice([path for path in newest.parent.iterdir() if path.is_file()]), site.rng)
    yield


@contextmanager
def failing_remote(site: Site, *, status: int) -> Iterator[None]:
    """Let the DVC remote answer every request with an HTTP status, or with none (0)."""
    site.wait_for(RUN["a stage"])
    with site.remote.failing(status):
        time.sleep(site.pause())
        yield


def flip_byte(path: Path, rng: Random) -> None:
    """Flip the bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    if not data:
        return
    data[rng.randrange(len(data))] ^= 0xFF
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)


FAULTS: dict[str, Callable[[Site], AbstractContextManager[None]]] = {
    **{
        f"{name} is killed": partial(send, part=part, number=signal.SIGKILL)
        for name, part in {**SERVICES, **RUN}.items()
    },
    **{
        f"{name} gets SIGTERM": partial(send, part=RUN[name], number=signal.SIGTERM)
        for name in ("the flow", "a stage", "a rank")
    },
    **{
        f"{name} is stopped": partial(stop, part=(SERVICES | RUN)[name])
        for name in ("the worker", "MLflow", "Prefect", "the flow", "a stage", "a rank")
    },
    "the run is cancelled": cancel,
    "the machine restarts": reboot,
    "the stack is restarted": restart,
    "the servers are away": servers_away,
    "the disk is full": full_disk,
    "DVC's cache is read-only": read_only_cache,
    "Prefect's database is locked": partial(locked_database, file="prefect/prefect.db"),
    "MLflow's database is locked": partial(locked_database, file="mlflow.db"),
    "files of DVC's cache are damaged": partial(damaged_files, folder=".dvc/cache/files", pattern="*"),
    "a checkpoint is damaged": damaged_checkpoint,
    "the remote answers 500": partial(failing_remote, status=500),
    "the remote answers 403": partial(failing_remote, status=403),
    "the remote is away": partial(failing_remote, status=0),
}
# Those that need a disk of their own, which only root can mount.
MOUNTED = ("the disk is full", "DVC's cache is read-only")
