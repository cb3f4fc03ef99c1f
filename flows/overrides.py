"""Parameter overrides of one run: checked, written to params.yaml, and taken back afterwards.

A run works in the checkout, so the original file is kept in the state folder while an override is
in force. If the run is killed, the next run puts it back first.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from tasks.check import check
from tasks.config import PARAMS, read_params, report
from tasks.files import write_text
from tasks.state import state_dir


@contextmanager
def applied(overrides: Mapping[str, Any], path: Path = PARAMS) -> Iterator[None]:
    """Check params.yaml with the overrides, and let them hold within the block.

    Args:
        overrides: `section.key` -> value.
        path: The parameter file.

    Raises:
        ConfigError: The file or an override is wrong; every problem is listed and nothing changes.
    """
    original = state_dir() / "params.before-overrides.yaml"
    if original.is_file():
        restore(original, path)
    text = edit(path.read_text(encoding="utf-8"), overrides) if overrides else None
    check(yaml.safe_load(text) if text else read_params(path))
    if text is None:
        yield
        return
    original.parent.mkdir(parents=True, exist_ok=True)
    write_text(original, path.read_text(encoding="utf-8"))
    write_text(path, text)
    try:
        yield
    finally:
        restore(original, path)


def restore(original: Path, path: Path) -> None:
    """Put the file back as it was before the overrides."""
    shutil.copyfile(original, path)
    original.unlink()


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
    values = parser.load(text)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    out = StringIO()
    parser.dump(values, out)
    return out.getvalue()
