"""Errors that the user can fix.

Each message contains the place, the problem, the value and the fix. `nightshift.core.stage.run_main`
prints the error as one line and exits with its code. Any other exception is a bug: it keeps its
traceback and exits with 1.
"""

import re
from collections.abc import Sequence
from typing import Literal

Kind = Literal["out_of_memory", "loss", "hang", "preempted"]


class PipelineError(Exception):
    """Base class of errors that the user can fix. Not retried, except for `TrainingError`."""

    exit_code = 2


class ConfigError(PipelineError):
    """Invalid params.yaml, override or environment."""


class DataError(PipelineError):
    """An input file or row violates its contract."""


class StageError(PipelineError):
    """A stage, or a process that it started, failed."""


class TrainingError(StageError):
    """Training stopped, but a retry from the last checkpoint may get further.

    Attributes:
        kind: out_of_memory: the retry halves the micro-batch; loss: non-finite loss or a spike, the
            retry skips those rows; hang: a step took too long; preempted: SIGTERM was received.
        steps: Optimizer steps with a bad loss, counted from 1; empty for other kinds.
    """

    EXIT_CODES: dict[Kind, int] = {"out_of_memory": 10, "loss": 11, "hang": 12, "preempted": 75}  # noqa: RUF012

    def __init__(self, kind: Kind, message: str, steps: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.steps = tuple(steps)
        self.exit_code = self.EXIT_CODES[kind]


class GateError(PipelineError):
    """A model must not move: the gate, the registry or an alias forbids it."""


def first_line(err: BaseException) -> str:
    r"""Return kind and first line of an error, without credentials: the errors of clients contain URLs.

    Example:
        >>> first_line(OSError("GET http://ada:secret@mlflow.example/api: timed out\nRetry"))
        'OSError: GET http://mlflow.example/api: timed out'
    """
    line = f"{type(err).__name__}: {err}".partition("\n")[0]
    return re.sub(r"//[^/@\s]+@", "//", line)[:500]
