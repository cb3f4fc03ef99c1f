"""The errors that a user can act on.

Every message says where, what is wrong, the value, and the remedy. `nightshift.core.stage.run_main` prints
such an error as one line and exits with its code; any other exception is a bug: it keeps its traceback and
exits with 1.
"""

from collections.abc import Sequence
from typing import Literal

Kind = Literal["out_of_memory", "loss", "hang", "preempted"]


class PipelineError(Exception):
    """Base of all errors that a user can act on. What is wrong stays wrong: nothing is tried again."""

    exit_code = 2


class ConfigError(PipelineError):
    """params.yaml, an override or the environment is wrong."""


class DataError(PipelineError):
    """An input file or row breaks its contract."""


class StageError(PipelineError):
    """A stage or a process that it started did not finish its work."""


class TrainingError(StageError):
    """A training stopped where another attempt, which goes on from the last checkpoint, may get further.

    Attributes:
        kind: out_of_memory: the next attempt takes half the micro-batch; loss: it was not finite or a spike,
            and the next attempt leaves those rows out; hang: a step took too long; preempted: SIGTERM came.
        steps: Optimiser steps, from 1, that a failure of the kind loss speaks of.
    """

    EXIT_CODES: dict[Kind, int] = {"out_of_memory": 10, "loss": 11, "hang": 12, "preempted": 75}  # noqa: RUF012

    def __init__(self, kind: Kind, message: str, steps: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.steps = tuple(steps)
        self.exit_code = self.EXIT_CODES[kind]


class GateError(PipelineError):
    """A model must not move: the gate, the registry or an alias says no."""
