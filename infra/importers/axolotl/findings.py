"""What becomes of a key of an Axolotl file, and how its values are read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]
DEFAULT = "Axolotl's default"


@dataclass(frozen=True, slots=True)
class Finding:
    """What becomes of one key.

    Attributes:
        kind: mapped: it sets `target`; not_needed: nothing is lost; unmapped: somebody must decide;
            contradiction: the file says two things.
        key: Axolotl's key.
        note: Why, and what to do.
        target: `section.key` of params.yaml.
        value: What it is set to.
        is_default: The file does not name the key; Axolotl's default holds.
    """

    kind: Literal["mapped", "not_needed", "unmapped", "contradiction"]
    key: str
    note: str = ""
    target: str = ""
    value: Any = None
    is_default: bool = False


Findings = Iterator[Finding]


def mapped(key: str, target: str, value: Any, note: str = "") -> Finding:
    """Say that a key sets `section.key`."""
    return Finding("mapped", key, note, target, value)


def default(key: str, target: str, value: Any, note: str = DEFAULT) -> Finding:
    """Say that a key which is not there has a default that sets `section.key`."""
    return Finding("mapped", key, note, target, value, is_default=True)


def not_needed(key: str, why: str) -> Finding:
    """Say that nothing is lost without a key."""
    return Finding("not_needed", key, why)


def unmapped(key: str, why: str) -> Finding:
    """Say that a key has no counterpart, and what to do."""
    return Finding("unmapped", key, why)


def contradiction(key: str, other: str, why: str) -> Finding:
    """Say that two keys exclude each other."""
    return Finding("contradiction", f"{key} and {other}", why)


def read(key: str, target: str, value: Any, convert: Callable[[Any], Any], note: str = "") -> Finding:
    """Map a value, or say why it cannot be read."""
    try:
        return mapped(key, target, convert(value), note)
    except ValueError as err:
        return unmapped(key, str(err))


def number(value: Any) -> float:
    """Read a number; PyYAML takes `1e-4` for a text.

    Raises:
        ValueError: It is none.

    Example:
        >>> number("1e-4"), number(2)
        (0.0001, 2.0)
    """
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{value!r} is not a number; correct it")


def whole(value: Any) -> int:
    """Read a whole number.

    Raises:
        ValueError: It is none.

    Example:
        >>> whole(3.0), whole("1e3")
        (3, 1000)
    """
    found = number(value)
    if not found.is_integer():
        raise ValueError(f"{value!r} is not a whole number; write one into params.yaml")
    return int(found)


def switch(value: Any) -> bool:
    """Read true or false.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false; choose one in params.yaml")
    return value


def above_zero(value: Any) -> float | None:
    """Read a number of which 0 means none.

    Raises:
        ValueError: It is no number.
    """
    return number(value) or None


def steps(value: Any) -> int:
    """Read a number of optimiser steps.

    Raises:
        ValueError: It is a share of all steps, which are known after packing only.
    """
    if 0 < number(value) < 1:
        raise ValueError(f"{value} is a share of all steps; {AFTER_PACKING}")
    return whole(value)


AFTER_PACKING = (
    "steps are known after packing only: run `dvc repro pack` and divide packed_rows in "
    "data/pack/summary.json by num_processes x per_device_train_batch_size x "
    "gradient_accumulation_steps; that is one epoch"
)
