"""Proof that a process is alive: its pid, its start in clock ticks since boot, and the boot id.

A pid alone may have been reused, and a start time in seconds changes whenever the clock is set. A lease
is the identity of the process that works on a flow run, stored in the state folder. Prefect's state of
the run is not proof in either direction.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from nightshift.core.files import read_state, write_json
from nightshift.core.state import state_dir

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Identity = dict[str, Any]  # pid, start_ticks, boot_id


def identify(pid: int) -> Identity:
    """Return the unique identity of a process, which a change of the clock does not affect.

    Raises:
        ProcessLookupError: The process does not exist.
    """
    return {"pid": pid, "start_ticks": start_ticks(pid), "boot_id": boot_id()}


def boot_id() -> str:
    """Return the id of the current boot of this machine."""
    return BOOT_ID.read_text().strip()


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (field 22 of proc(5)'s `stat`).

    Raises:
        ProcessLookupError: The process does not exist.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError as err:
        raise ProcessLookupError(pid) from err
    # The second field, the process name, may contain spaces and brackets.
    return int(stat.rpartition(")")[2].split()[19])


def find_process(identity: Identity | None) -> psutil.Process | None:
    """Return the process, or None if it has ended, even if its pid was reused."""
    if not identity:
        return None
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if identify(identity["pid"]).items() <= identity.items():
            found = psutil.Process(identity["pid"])
            return found if is_alive(found) else None
    return None


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is still running; a zombie is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        # If a container's init process does not reap orphans, a zombie stays.
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def lease_file(flow_run: str) -> Path:
    """Return the path of a flow run's lease."""
    return state_dir() / "leases" / f"{flow_run}.json"


@contextlib.contextmanager
def lease(flow_run: str) -> Iterator[None]:
    """Hold the lease of a flow run for this process while the block runs.

    Args:
        flow_run: Id of the Prefect flow run.
    """
    file = lease_file(flow_run)
    write_json(file, {**identify(os.getpid()), "host": platform.node()})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def lease_holder(flow_run: str) -> Literal["alive", "dead", "elsewhere"] | None:
    """Return the state of the process that works on a flow run.

    Returns:
        alive or dead; elsewhere if another machine wrote the lease, so that this one cannot check the
        process; None without a lease: the run has not started, or has finished.
    """
    file = lease_file(flow_run)
    if not file.is_file():
        return None
    held = read_state(file)
    if held is None:
        # Only a machine that stopped leaves a damaged one.
        return "dead"
    if held["host"] != platform.node():
        return "elsewhere"
    return "alive" if find_process(held) else "dead"


def leased_runs() -> list[str]:
    """Return the ids of the flow runs that have a lease."""
    return sorted(file.stem for file in lease_file("*").parent.glob("*.json"))
