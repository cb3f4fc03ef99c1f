"""Proof that a process lives: its id, its start in clock ticks since boot, and the boot it belongs to.

A pid alone may have been given to another process since, and a start in seconds moves whenever the clock is
set. A lease is the identity of the process that works on a flow run, kept in the state folder: what Prefect
says about the run is no proof either way.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from nightshift.core.files import read_json, write_json
from nightshift.core.state import state_dir

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Identity = dict[str, Any]  # pid, start_ticks, boot_id


def identify(pid: int) -> Identity:
    """Return what tells a process from every other, before and after a change of the clock.

    Raises:
        ProcessLookupError: There is no such process.
    """
    return {"pid": pid, "start_ticks": start_ticks(pid), "boot_id": BOOT_ID.read_text().strip()}


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (field 22 of proc(5)'s `stat`).

    Raises:
        ProcessLookupError: There is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError as err:
        raise ProcessLookupError(pid) from err
    # The second field, the name, may hold spaces and brackets.
    return int(stat.rpartition(")")[2].split()[19])


def find_process(identity: Identity | None) -> psutil.Process | None:
    """Return the process, or None if it has ended, even if its pid was given to another since."""
    if not identity:
        return None
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if identify(identity["pid"]).items() <= identity.items():
            found = psutil.Process(identity["pid"])
            return found if is_alive(found) else None
    return None


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        # In a container whose first process collects no orphans, a zombie stays for ever.
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def lease_file(flow_run: str) -> Path:
    """Return where the lease of a flow run is kept."""
    return state_dir() / "leases" / f"{flow_run}.json"


@contextlib.contextmanager
def lease(flow_run: str) -> Iterator[None]:
    """Keep the lease of a flow run, for this process, while the block runs.

    Args:
        flow_run: Id of the run in Prefect.
    """
    file = lease_file(flow_run)
    write_json(file, {**identify(os.getpid()), "host": platform.node()})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def lease_holder(flow_run: str) -> Literal["alive", "dead", "elsewhere"] | None:
    """Return what is known of the process that works on a flow run.

    Returns:
        Whether it is alive or dead; elsewhere if another machine wrote the lease, so that nothing can be told
        from here; None without a lease: the run has not begun, or is done.
    """
    file = lease_file(flow_run)
    if not file.is_file():
        return None
    held = read_json(file)
    if held["host"] != platform.node():
        return "elsewhere"
    return "alive" if find_process(held) else "dead"


def leased_runs() -> list[str]:
    """Return the ids of the flow runs that have a lease."""
    return sorted(file.stem for file in lease_file("*").parent.glob("*.json"))
