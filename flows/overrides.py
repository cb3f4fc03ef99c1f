"""Parameter overrides of one run, which exist only in the params.yaml of its workspace."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightshift.core.config import PARAMS
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import write_text
from nightshift.core.state import state_dir
from nightshift.pipeline.workspaces import is_workspace
from tasks.check import check_overrides


@contextmanager
def override_params(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Validate params.yaml with the overrides; write them in a workspace, keep other runs out of a checkout.

    Args:
        overrides: Values by `section.key`.

    Raises:
        ConfigError: The file or an override is invalid, lists every problem; or there are overrides, but no
            workspace.
        StageError: Another run is active in this checkout.
    """
    text = check_overrides(overrides)
    if is_workspace():
        if overrides:
            write_text(PARAMS, text)
        yield
        return
    if overrides:
        raise ConfigError(
            f"{Path.cwd()}: overrides need a run with its own {PARAMS}: use "
            f"`nightshift run --overrides ...` or `prefect deployment run finetune/prod`, or edit {PARAMS}"
        )
    with exclusive_run():
        yield


@contextmanager
def exclusive_run() -> Iterator[None]:
    """Keep other runs out of the checkout, where files of two runs would mix.

    Raises:
        StageError: Another run is active in this checkout.
    """
    file = state_dir() / "run.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            lock.seek(0)
            raise StageError(
                f"{Path.cwd()}: another run is active here (pid {lock.read()}); wait for it, or cancel it"
            ) from err
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
