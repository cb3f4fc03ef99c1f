"""The errors that a user can act on.

Every message says where, what is wrong, the value, and the remedy. `tasks.stage.run_main` prints
such an error as one line and exits with code 2; any other exception is a bug and keeps its traceback.
"""


class PipelineError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(PipelineError):
    """params.yaml, an override or the environment is wrong."""


class DataError(PipelineError):
    """An input file or row breaks its contract."""


class StageError(PipelineError):
    """A stage or a process that it started did not finish its work."""


class CheckpointError(PipelineError):
    """A checkpoint is missing, incomplete, or belongs to another plan."""


class GateError(PipelineError):
    """A model must not move: the gate, the registry or an alias says no."""
