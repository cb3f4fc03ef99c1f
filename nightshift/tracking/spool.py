"""Buffer for values logged to MLflow: written to disk first, then sent by a separate thread.

A spool is a JSON Lines file, `tracking/<training>-<run>.jsonl` in the state folder. Its first line
identifies the run, which may not exist yet; the rest are entries in order. The `.json` file next to it
stores how much MLflow has received. It is written after the entries are sent, so a kill in between sends
them again: MLflow's databases keep a metric with equal name, step, time and value once.
"""

import fcntl
import itertools
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nightshift.core.errors import first_line
from nightshift.core.files import jsonl, read_json, read_state, write_json, write_text
from nightshift.core.state import state_dir
from nightshift.tracking.runs import dataset_input, find_run, open_run, run_id, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's defaults, 120 s and 7 retries, would keep a training run from ending for minutes.
HTTP = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
# One request per second, however fast the steps are; fewer while the server is down.
SEND_SECONDS, RETRY_SECONDS = 1.0, 10.0
# Maximum delay at the end of a rank, and at the start and end of the stage.
FLUSH_SECONDS, REPLAY_SECONDS = 5.0, 30.0
# MLflow accepts 1000 metrics per request; an entry has up to eight.
ENTRIES_PER_REQUEST = 100
# A retry would get the same answer.
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
log = logging.getLogger(__name__)
Entry = dict[str, Any]


class Spool:
    """Writing end of a spool, for a training run: `log` returns immediately, whatever MLflow does."""

    def __init__(self, path: Path, uri: str) -> None:
        """Resume the spool of an earlier attempt, and start sending."""
        self.path, self.uri = path, uri
        self.logged = {name for entry in read_spool(path)[1:] for name in names(entry)}
        self.is_written = True
        self.pending, self.closing = threading.Event(), threading.Event()
        limit_requests()
        self.thread = threading.Thread(target=self.send_all, name="tracking", daemon=True)
        self.thread.start()

    def log(self, kind: str, **entry: Any) -> None:
        """Append an entry; values that were logged before a resume are skipped.

        Args:
            kind: metrics (values, step; time is added), params (values), dataset (name, digest, source).
            entry: Fields of the kind.
        """
        if kind == "metrics":
            step = entry["step"]
            values = {key: value for key, value in entry["values"].items() if (key, step) not in self.logged}
            entry |= {"values": values, "time": now()}
        new = names({"kind": kind, **entry}) - self.logged
        if not new:
            return
        try:
            append(self.path, {"kind": kind, **entry})
        except OSError as err:
            if self.is_written:
                log.warning(
                    "tracking: cannot write: %s; free disk space, or values are missing in MLflow", err
                )
            self.is_written = False
        else:
            self.logged |= new
            self.pending.set()

    def close(self) -> None:
        """Wait up to `FLUSH_SECONDS` for MLflow; pending entries stay in the spool."""
        self.closing.set()
        self.pending.set()
        self.thread.join(FLUSH_SECONDS)

    def send_all(self) -> None:
        """Send pending entries until the spool is closed."""
        is_down = False
        while True:
            self.pending.clear()
            is_last = self.closing.is_set()
            is_down = not self.has_sent(was_down=is_down)
            if is_last:
                return
            self.closing.wait(RETRY_SECONDS if is_down else SEND_SECONDS)
            if not is_down:
                self.pending.wait()

    def has_sent(self, *, was_down: bool) -> bool:
        """Send pending entries; log once when MLflow goes down, and once when it is back.

        Args:
            was_down: Whether the previous attempt failed.

        Returns:
            Whether MLflow has received everything.
        """
        try:
            send(self.path, connect(self.uri))
        # Any error: tracking must never stop training.
        except Exception as err:  # noqa: BLE001
            if not was_down:
                log.warning("%s", describe_failure(self.path, err))
            return False
        if was_down:
            log.info("tracking: MLflow is back and has received all buffered values")
        return True


def begin(folder: Path, training: str, run_id: str | None, before: Path | None = None) -> Path:
    """Return the spool of a training run: the previous attempt's, or a new one for another MLflow run.

    The MLflow run of a resumed training gets the previous run's entries, so its curves are complete.

    Args:
        folder: Folder of all spools.
        training: Key of the training run.
        run_id: MLflow run to log to; None for a run to be created when MLflow responds.
        before: Spool of the previous attempt, which may no longer exist.
    """
    entries: list[Entry] = []
    if before and before.is_file():
        header, *entries = read_spool(before)
        if header["run_id"] == run_id:
            return before
        finish(before, "FAILED")
    name = run_id or f"by-hand-{secrets.token_hex(4)}"
    path = folder / f"{training}-{name}.jsonl"
    if not path.is_file():
        position_file(path).unlink(missing_ok=True)
        header = {"run_id": run_id, "name": name, "key": path.stem, "time": now()}
        write_text(path, jsonl([header, *(entry for entry in entries if entry["kind"] != "end")]))
    return path


def finish(path: Path, status: str = "FINISHED") -> None:
    """Append the end of the run, if the spool still exists.

    Args:
        path: Path of the spool, which is removed once everything has been sent.
        status: MLflow status of a run that the spool created; other runs get theirs from their owner.
    """
    if path.is_file() and read_spool(path)[-1].get("kind") != "end":
        append(path, {"kind": "end", "status": status, "time": now()})


def replay(folder: Path, uri: str) -> None:
    """Send the pending entries of all spools, for `REPLAY_SECONDS` at most; warn about what is left."""
    deadline = time.monotonic() + REPLAY_SECONDS
    for path in sorted(folder.glob("*.jsonl")):
        try:
            send(path, connect(uri), deadline)
        # Any error: tracking must never stop training.
        except Exception as err:  # noqa: BLE001
            log.warning("%s", describe_failure(path, err))
            # This server may lack this run but have the next one; a server that is down has none.
            if getattr(err, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                return


def connect(uri: str) -> "MlflowClient":
    """Return an MLflow client; MLflow is imported here, in the sending thread."""
    from mlflow import MlflowClient

    return MlflowClient(uri)


def send(path: Path, client: "MlflowClient", deadline: float = math.inf) -> None:
    """Send pending entries in order, and store the position after each request.

    Args:
        path: Path of the spool, which is removed when it has ended and was sent completely.
        client: MLflow client.
        deadline: Latest start of a request on the monotonic clock, seconds.

    Raises:
        MlflowException: MLflow does not respond, or does not have the run.
        TimeoutError: The deadline has passed.
    """
    with locked(path) as file:
        first = file.readline()
        header, position = json.loads(first), read_position(path)
        run_id = position["run_id"] or header["run_id"]
        if run_id is None:
            run_id = open_run(client, header["key"], header["name"], header["time"])
        sent = max(position["sent"], len(first))
        if position["run_id"] is None:
            write_json(position_file(path), {"run_id": run_id, "sent": sent})
        file.seek(sent)
        lines = [line for line in file if line.endswith(b"\n")]
        # Synced before it is sent: after a power loss, the position is never beyond the end of the file.
        os.fsync(file.fileno())
        for batch in batches(lines):
            if time.monotonic() > deadline:
                raise TimeoutError(f"sending took longer than {REPLAY_SECONDS:.0f} s")
            entries = [json.loads(line) for line in batch]
            if entries[0]["kind"] == "end":
                if header["run_id"] is None:
                    client.set_terminated(run_id, entries[0]["status"], entries[0]["time"])
                path.unlink(missing_ok=True)
                return
            deliver(client, run_id, entries)
            sent += sum(map(len, batch))
            write_json(position_file(path), {"run_id": run_id, "sent": sent})


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open a spool for sending, in one process at a time."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            # Closing is not enough: a process forked in the meantime also holds the file open.
            fcntl.flock(file, fcntl.LOCK_UN)


def deliver(client: "MlflowClient", run_id: str, entries: list[Entry]) -> None:
    """Log entries of one kind in one request; entries that MLflow rejects are reported and skipped.

    Raises:
        MlflowException: MLflow does not respond, or does not have the run.
    """
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    try:
        match entries[0]["kind"]:
            case "metrics":
                metrics = [
                    Metric(key, value, entry["time"], entry["step"])
                    for entry in entries
                    for key, value in entry["values"].items()
                ]
                client.log_batch(run_id, metrics=metrics)
            case "params":
                params = [Param(*pair) for entry in entries for pair in entry["values"].items()]
                client.log_batch(run_id, params=params)
            case "dataset":
                datasets = [
                    dataset_input(entry["name"], entry["digest"], entry["source"], "training")
                    for entry in entries
                ]
                client.log_inputs(run_id, datasets=datasets)
    except MlflowException as err:
        if err.error_code not in REFUSED:
            raise
        log.warning("tracking: MLflow rejected %s of run %s: %s; skipped", entries, run_id, err)


def batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Split lines into groups of one kind that fit into a request."""
    for _, run in itertools.groupby(lines, key=lambda line: json.loads(line)["kind"]):
        same = list(run)
        for i in range(0, len(same), ENTRIES_PER_REQUEST):
            yield same[i : i + ENTRIES_PER_REQUEST]


def append(path: Path, entry: Entry) -> None:
    """Append an entry after the last complete one: a crash or a full disk can leave a partial line.

    Raises:
        OSError: The entry cannot be written.
    """
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        file.write(jsonl([entry]).encode())


def read_spool(path: Path) -> list[Entry]:
    """Read the header and all complete entries."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def names(entry: Entry) -> set[tuple[str, int]]:
    """Return the (name, step) pairs that an entry logs; each pair is logged once per run.

    Example:
        >>> sorted(names({"kind": "metrics", "values": {"loss": 2.0, "grad_norm": 1.0}, "step": 3}))
        [('grad_norm', 3), ('loss', 3)]
        >>> names({"kind": "params", "values": {"sft.lora_r": "16"}})
        {('params', 0)}
    """
    if entry["kind"] == "metrics":
        return {(key, entry["step"]) for key in entry["values"]}
    return {(entry["kind"], 0)}


def position_file(path: Path) -> Path:
    """Return the file with the run id of a spool and the number of bytes that MLflow has received."""
    return path.with_suffix(".json")


def read_position(path: Path) -> Entry:
    """Read how much MLflow has received; nothing for a spool that was never sent."""
    return read_state(position_file(path)) or {"run_id": None, "sent": 0}


def find_run_id(path: Path) -> str | None:
    """Return the run of a spool, or None while MLflow could not create it."""
    header = read_spool(path)[0] if path.is_file() else {"run_id": None}
    found: str | None = read_position(path)["run_id"] or header["run_id"]
    return found


def describe_failure(path: Path, err: BaseException) -> str:
    """Describe what MLflow did not receive, why, and what happens to it."""
    return (
        f"tracking: MLflow did not receive all of {path}: {first_line(err)}; training continues; the rest "
        "is sent later, at the latest by the next `python -m tasks.sft`; check `nightshift status` and "
        "MLFLOW_TRACKING_URI"
    )


def limit_requests() -> None:
    """Limit how long this process waits for MLflow, unless the environment sets other limits."""
    for variable, value in HTTP.items():
        os.environ.setdefault(variable, value)


def now() -> int:
    """Return the time as MLflow stores it: milliseconds since 1970."""
    return int(time.time() * 1000)


def training_run(client: "MlflowClient", record_file: Path) -> str:
    """Return the run that trained the candidate, or a new run if this MLflow does not have it.

    If MLflow did not respond during training, the run is still in the spool, and is created now.

    Args:
        client: MLflow client.
        record_file: mlflow_run.json of the stage sft.
    """
    from mlflow.exceptions import MlflowException

    replay(state_dir() / "tracking", tracking_uri())
    record = read_json(record_file)
    trained_by = record["run_id"] or find_run(client, record["tracking_key"])
    try:
        return str(client.get_run(str(trained_by)).info.run_id)
    except MlflowException:
        log.warning("MLflow has no run %s: the model was trained with another server", trained_by)
        return run_id(client)
