"""Parameter overrides of one run: validated, written to params.yaml, and reverted afterwards.

A checkout has one run at a time. While overrides are active, the state folder contains params.yaml as it
was before and as the run wrote it. The overrides are reverted at the end, or at the start of the next
run if this one is killed; edits made in the meantime are kept.
"""

import fcntl
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightshift.core.config import PARAMS
from nightshift.core.errors import StageError
from nightshift.core.files import write_text
from nightshift.core.state import state_dir
from tasks.check import check_overrides

log = logging.getLogger(__name__)


@contextmanager
def override_params(overrides: Mapping[str, Any], path: Path = PARAMS) -> Iterator[None]:
    """Validate params.yaml with the overrides, and apply them within the block.

    Args:
        overrides: Values by `section.key`.
        path: Path of the config file.

    Raises:
        ConfigError: The file or an override is invalid; lists every problem and changes nothing.
        StageError: Another run is active in this checkout.
    """
    with exclusive_run():
        revert(path)
        text = check_overrides(overrides, path)
        if not overrides:
            yield
            return
        write_text(written_file(), text)
        write_text(before_file(), path.read_text(encoding="utf-8"))
        write_text(path, text)
        try:
            yield
        finally:
            revert(path)


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


def before_file() -> Path:
    """Return the path of the copy of params.yaml from before the overrides."""
    return state_dir() / "params.before-overrides.yaml"


def written_file() -> Path:
    """Return the path of the copy of params.yaml as the run wrote it."""
    return state_dir() / "params.with-overrides.yaml"


def revert(path: Path) -> None:
    """Revert the overrides of this or of a killed run; do nothing if there are none."""
    before, written = before_file(), written_file()
    if before.is_file():
        # Version 0.1.0 kept no copy of the file as written.
        if not written.is_file() or path.read_bytes() == written.read_bytes():
            write_text(path, before.read_text(encoding="utf-8"))
        elif path.read_bytes() != before.read_bytes():
            write_text(path, merge(path, written, before))
            log.warning(
                "%s was edited during a run with overrides; they are reverted, the edit is kept", path
            )
    # In reverse order of creation: `written` has no effect without `before`.
    before.unlink(missing_ok=True)
    written.unlink(missing_ok=True)


def merge(edited: Path, written: Path, before: Path) -> str:
    """Return the edited file without the overrides; a line that both changed keeps the edit.

    Raises:
        StageError: Git cannot merge the three files.
    """
    command = ["git", "merge-file", "--stdout", "--ours", str(edited), str(written), str(before)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise StageError(
            f"{edited}: was edited during a run with overrides, and cannot be merged: {done.stderr.strip()}; "
            f"the file without them is {before}: merge the edit manually, then delete {written}"
        )
    return done.stdout
