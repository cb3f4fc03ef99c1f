"""Record and end processes that outlive the command that started them."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from nightshift.core.errors import StageError
from nightshift.core.files import write_json
from nightshift.pipeline.leases import boot_id, find_process, is_alive

HOST = "127.0.0.1"
TERM_SECONDS, KILL_SECONDS = 10, 30
Record = dict[str, Any]  # service in stack.json: process identity and port (0 if it has none)
log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[Path]:
    """Hold the lock of the state folder, so that only one `up` or `down` runs at a time.

    An existing lock file is only read: `down` must also work on a full or read-only disk.
    """
    home.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(home / "stack.lock", os.O_RDONLY | os.O_CREAT, 0o644)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another `nightshift up` or `down` is running in %s; waiting for it", home)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield home


def read_records(home: Path) -> dict[str, Record]:
    """Read stack.json: service -> record; empty if nothing was started yet.

    Raises:
        StageError: An earlier version of Nightshift wrote it, and one of its processes may still run.
    """
    path = home / "stack.json"
    # Not read_state: the servers in a damaged file may run, and others would open the same databases.
    records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    for service, record in records.items():
        if "boot_id" not in record and psutil.pid_exists(record["pid"]):
            raise StageError(
                f"{path}: written by an earlier version: {service} may be pid {record['pid']}; "
                "end that process and delete the file"
            )
    return records


def write_records(home: Path, records: dict[str, Record]) -> None:
    """Write stack.json atomically."""
    write_json(home / "stack.json", records)


def remove_records(home: Path) -> None:
    """Remove stack.json, which needs no disk space."""
    (home / "stack.json").unlink(missing_ok=True)


def port_holder(port: int) -> str | None:
    """Return the process that holds a port, or else why it is unavailable; None if the port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as err:
            reason = str(err.strerror)
        else:
            return None
    with contextlib.suppress(psutil.Error):  # some systems show sockets only to root
        for found in psutil.net_connections("tcp"):
            listens = found.status == psutil.CONN_LISTEN and found.laddr[1:2] == (port,)
            if listens and found.pid:
                return f"pid {found.pid} ({psutil.Process(found.pid).name()})"
    return reason


def end_remains(record: Record | None) -> None:
    """End what a dead process has left in its session: a child of MLflow's server would keep its port."""
    if record is None or record["boot_id"] != boot_id() or find_process(record):
        return
    left = []
    for process in psutil.process_iter():
        # No new process gets the pid of the leader while its session exists.
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == record["pid"]:
                left.append(process)
    end(left)


def end(processes: list[psutil.Process]) -> None:
    """End processes: SIGTERM, time to end their children, SIGTERM to the children, finally SIGKILL."""
    below: set[psutil.Process] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            below.update(process.children(recursive=True))
    everything = {*processes, *below}
    for targets, step, seconds in (
        (processes, psutil.Process.terminate, TERM_SECONDS),
        (below.difference(processes), psutil.Process.terminate, KILL_SECONDS),
        (everything, psutil.Process.kill, 5),
    ):
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                step(process)
        deadline = time.monotonic() + seconds
        while any(map(is_alive, everything)) and time.monotonic() < deadline:
            time.sleep(0.05)
