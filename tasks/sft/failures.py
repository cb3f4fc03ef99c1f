"""Reasons why a training run stopped, and what the next attempt changes.

The ranks write a failure to the folder of the training run. The stage turns it into an error whose exit
code shows whether a retry makes sense, and records what the next attempt must change. The steps, and the
tokens of each step, stay those of the plan.
"""

import contextlib
import os
import re
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nightshift.core.errors import StageError, TrainingError
from nightshift.core.files import read_state, write_json
from tasks.sft import checkpoints

# Out-of-memory messages of torch's allocators, CUDA, ROCm, cuBLAS and related libraries, NCCL, Triton
# and bitsandbytes. Triton's "out of resource" is not included: it is the limit of one kernel.
OUT_OF_MEMORY = re.compile(
    r"out of memory|_ALLOC_FAILED|can't allocate memory|cannot allocate memory|not enough memory"
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory|ERROR_OUT_OF_MEMORY|std::bad_alloc",
    re.IGNORECASE,
)
# Errors of gloo and NCCL in the ranks that are left when one ends.
LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|remote process exited|gloo/transport", re.IGNORECASE
)
FAILURE, ATTEMPT, HANG = "failure.json", "attempt.json", "hang-{rank}.txt"
# Traceback of an unknown error, next to the checkpoints.
TRACEBACK = "traceback-{rank}.txt"


@dataclass(frozen=True, slots=True)
class Attempt:
    """Changes to the parameters.

    Attributes:
        halvings: Number of times the micro-batch was halved and gradient accumulation doubled.
        skipped: Steps, from 1, whose rows are skipped.
        hangs: Number of hung steps.
    """

    halvings: int = 0
    skipped: tuple[int, ...] = ()
    hangs: int = 0


def read_attempt(folder: Path) -> Attempt:
    """Read the changes for the next attempt; the first one has none."""
    values = read_state(folder / ATTEMPT)
    return Attempt(**{**values, "skipped": tuple(values["skipped"])}) if values else Attempt()


def micro_batch_size(rows: int, halvings: int) -> int:
    """Return the rows per forward pass: `rows` halved `halvings` times, then reduced to a divisor.

    With any other number the steps would not keep their rows.

    Example:
        >>> [micro_batch_size(12, halvings) for halvings in range(4)], micro_batch_size(5, 1)
        ([12, 6, 3, 1], 1)
    """
    return next(n for n in range(max(1, rows >> halvings), 0, -1) if rows % n == 0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, reports out of memory."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def write_failure(folder: Path, kind: str, message: str, steps: tuple[int, ...] = ()) -> None:
    """Write the reason of the first rank that fails; the other ranks fail because of it."""
    own_file = folder / f"failure-{os.getpid()}.json"
    # On a full disk the reason appears only in the terminal.
    with contextlib.suppress(OSError):
        write_json(own_file, {"kind": kind, "message": message, "steps": steps})
        os.link(own_file, folder / FAILURE)
    own_file.unlink(missing_ok=True)


def write_unknown(folder: Path, rank: str, error: BaseException) -> str:
    """Write the traceback of an error that no check foresaw, and its reason; return the message.

    The lost connection to a rank that ended is not a reason.
    """
    path = folder / TRACEBACK.format(rank=rank)
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    first = str(error).strip().partition("\n")[0]
    message = (
        f"unknown error {type(error).__name__}: {first}; traceback in {path}; whether another run would fail "
        "in the same way is not known"
    )
    if not LOST_PEER.search(str(error)):
        write_failure(folder, "error", message)
    return message


def clear_failure(folder: Path) -> None:
    """Delete the failure of a previous attempt."""
    (folder / FAILURE).unlink(missing_ok=True)
    for name in (HANG, TRACEBACK):
        for path in folder.glob(name.format(rank="*")):
            path.unlink()


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Return the failure written by the ranks, or None."""
    if failure := read_state(folder / FAILURE):
        return failure
    hung = [path for path in sorted(folder.glob(HANG.format(rank="*"))) if path.stat().st_size]
    if hung:
        return {"kind": "hang", "message": f"stack traces in {hung[0]}", "steps": []}
    return None


def plan_next_attempt(folder: Path, rows: int, code: int, stage: str = "sft") -> StageError:
    """Build the error of a failed attempt, and record the changes for the next one.

    Args:
        folder: Folder of the training run.
        rows: Rows per forward pass before any halving.
        code: Exit code of the launcher, for a failure without a reason.
        stage: Stage that trains.
    """
    failure = read_failure(folder)
    if failure is None:
        newest = max((checkpoints.step(path) for path in folder.glob("checkpoint-*")), default=None)
        start = "starts over" if newest is None else f"resumes from checkpoint-{newest}"
        return StageError(
            f"{stage}: the ranks exited with code {code} before training finished, and gave no reason; see "
            f"the output above. Another run {start}"
        )
    attempt, kind, message = read_attempt(folder), failure["kind"], failure["message"]
    rows_now = micro_batch_size(rows, attempt.halvings)
    match kind:
        case "out_of_memory" if rows_now > 1:
            next_attempt = replace(attempt, halvings=attempt.halvings + 1)
            fewer = micro_batch_size(rows, next_attempt.halvings)
            remedy = f"the next attempt uses {fewer} rows per forward pass instead of {rows_now}"
        case "out_of_memory":
            return StageError(
                f"{stage}: {message}; one row does not fit; set sft.activation_checkpointing, a strategy "
                "that shards more (zero3 with offloading), or a smaller pack.max_length"
            )
        case "loss" if not attempt.skipped:
            next_attempt = replace(attempt, skipped=tuple(failure["steps"]))
            remedy = "the next attempt resumes from the last checkpoint and skips these rows"
        case "hang" if not attempt.hangs:
            next_attempt = replace(attempt, hangs=1)
            remedy = "the next attempt resumes from the last checkpoint"
        case "preempted":
            next_attempt, remedy = attempt, "run again to resume from there"
        case "loss":
            return StageError(
                f"{stage}: {message}; rows were already skipped once; lower {stage}.learning_rate"
            )
        case "hang":
            return StageError(
                f"{stage}: a step hung twice; {message}; raise sft.step_timeout_seconds if it is only slow"
            )
        case _:
            return StageError(f"{stage}: {message}")
    write_json(folder / ATTEMPT, asdict(next_attempt))
    return TrainingError(kind, f"{stage}: {message}; {remedy}")
