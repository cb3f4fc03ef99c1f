"""Parameter overrides of one run: checked, written to params.yaml, and taken back afterwards.

A run works in the checkout, one at a time. While overrides are in force, the state folder holds params.yaml
as it was before and as the run wrote it: at the end, or at the start of the next run if this one is killed,
the overrides are taken back, and what somebody edited meanwhile is kept.
"""

import fcntl
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from tasks.check import check
from tasks.config import PARAMS, read_params, report
from tasks.errors import StageError
from tasks.files import write_text
from tasks.state import state_dir

log = logging.getLogger(__name__)


@contextmanager
def applied(overrides: Mapping[str, Any], path: Path = PARAMS) -> Iterator[None]:
    """Check params.yaml with the overrides, and let them hold within the block.

    Args:
        overrides: `section.key` -> value.
        path: The parameter file.

    Raises:
        ConfigError: The file or an override is wrong; every problem is listed and nothing changes.
        StageError: Another run is at work in this checkout.
    """
    with sole_run():
        take_back(path)
        text = edit(path.read_text(encoding="utf-8"), overrides) if overrides else None
        check(yaml.safe_load(text) if text else read_params(path))
        if text is None:
            yield
            return
        write_text(written_file(), text)
        write_text(before_file(), path.read_text(encoding="utf-8"))
        write_text(path, text)
        try:
            yield
        finally:
            take_back(path)


@contextmanager
def sole_run() -> Iterator[None]:
    """Keep other runs out of the checkout, whose files they would mix with those of this one.

    Raises:
        StageError: Another run is at work in it.
    """
    file = state_dir() / "run.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            lock.seek(0)
            raise StageError(
                f"{Path.cwd()}: another run is at work here (pid {lock.read()}); wait for it, or cancel it"
            ) from err
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def before_file() -> Path:
    """Return where params.yaml is kept as it was before the overrides."""
    return state_dir() / "params.before-overrides.yaml"


def written_file() -> Path:
    """Return where params.yaml is kept as the run wrote it."""
    return state_dir() / "params.with-overrides.yaml"


def take_back(path: Path) -> None:
    """Take the overrides of this or of a killed run out of the file; nothing happens without any."""
    before, written = before_file(), written_file()
    if before.is_file():
        # Version 0.1.0 kept no copy of what it wrote.
        if not written.is_file() or path.read_bytes() == written.read_bytes():
            write_text(path, before.read_text(encoding="utf-8"))
        elif path.read_bytes() != before.read_bytes():
            write_text(path, merge(path, written, before))
            log.warning(
                "%s was edited during a run with overrides; they are taken back, the edit is kept", path
            )
    # In this order, the reverse of their making: what `written` says without `before` is nothing.
    before.unlink(missing_ok=True)
    written.unlink(missing_ok=True)


def merge(edited: Path, written: Path, before: Path) -> str:
    """Return the edited file without the overrides; a line that both changed stays as it was edited.

    Raises:
        StageError: Git cannot merge the three.
    """
    command = ["git", "merge-file", "--stdout", "--ours", str(edited), str(written), str(before)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise StageError(
            f"{edited}: was edited during a run with overrides, and cannot be merged: {done.stderr.strip()}; "
            f"the file without them is {before}: put it right by hand, then delete {written}"
        )
    return done.stdout


def edit(text: str, overrides: Mapping[str, Any]) -> str:
    r"""Set `section.key` values in YAML text, comments kept.

    Raises:
        ConfigError: A key is not of the form `section.key`.

    Example:
        >>> edit("sft:\n  seed: 0 # order\n", {"sft.seed": 7})
        'sft:\n  seed: 7 # order\n'
    """
    if wrong := [key for key in overrides if len(key.split(".")) < 2]:
        raise report([f"override {key!r}: must be section.key" for key in wrong])
    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 4096
    # As the file writes it: ruamel's own choice for None is nothing at all.
    parser.representer.add_representer(
        type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    # Other readers of the file, PyYAML first, take `1e-05` for a text.
    parser.representer.add_representer(
        float,
        lambda self, number: self.represent_scalar("tag:yaml.org,2002:float", _float_text(number)),
    )
    values = parser.load(text)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        _place(target, last, value)
    out = StringIO()
    parser.dump(values, out)
    return out.getvalue()


def _float_text(number: float) -> str:
    """Write a float so that YAML 1.1 and 1.2 read it as one.

    Example:
        >>> _float_text(1e-05), _float_text(1.5e-08), _float_text(0.1)
        ('1.0e-05', '1.5e-08', '0.1')
    """
    text = repr(number)
    return text if "." in text else text.replace("e", ".0e")


def _place(parent: Any, key: str, value: Any) -> None:
    """Set a value where another stood, which ends with the comment of the key that follows.

    A mapping stays a block if the old one was; every other collection goes on one line, where that comment
    cannot come between the key and its items.
    """
    old = parent.get(key)
    is_block = isinstance(old, CommentedMap) and not old.fa.flow_style() and isinstance(value, dict) and value
    holder, place = parent, key
    if isinstance(value, dict):
        value = CommentedMap(value)
    elif isinstance(value, list):
        value = CommentedSeq(value)
    if is_block:
        holder, place = value, list(value)[-1]
    elif isinstance(value, CommentedMap | CommentedSeq):
        value.fa.set_flow_style()
    parent[key] = value
    if comment := _end_comment(old):
        holder.ca.items[place] = [None, None, comment, None]


def _end_comment(node: Any) -> Any:
    """Return the comment behind the last item of a collection, None without one."""
    found = None
    while isinstance(node, CommentedMap | CommentedSeq) and node:
        last = list(node)[-1] if isinstance(node, CommentedMap) else len(node) - 1
        found = node.ca.items.get(last, [None] * 4)[2 if isinstance(node, CommentedMap) else 0] or found
        node = node[last]
    return found
