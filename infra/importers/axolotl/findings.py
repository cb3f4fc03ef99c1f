"""Findings for the keys of an Axolotl file, and converters for their values."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]
DEFAULT = "Axolotl's default"


@dataclass(frozen=True, slots=True)
class Finding:
    """Import result of one key.

    Attributes:
        kind: mapped: the key sets `target`; not_needed: nothing is lost; unmapped: the user must decide;
            contradiction: two keys of the file conflict.
        key: Axolotl key.
        note: Reason, and what to do.
        target: `section.key` of params.yaml.
        value: Value of the target.
        is_default: Whether the key is missing from the file, so that Axolotl's default applies.
    """

    kind: Literal["mapped", "not_needed", "unmapped", "contradiction"]
    key: str
    note: str = ""
    target: str = ""
    value: Any = None
    is_default: bool = False


Findings = Iterator[Finding]


def mapped(key: str, target: str, value: Any, note: str = "") -> Finding:
    """Return the finding for a key that sets `section.key`."""
    return Finding("mapped", key, note, target, value)


def default(key: str, target: str, value: Any, note: str = DEFAULT) -> Finding:
    """Return the finding for a missing key whose default sets `section.key`."""
    return Finding("mapped", key, note, target, value, is_default=True)


def not_needed(key: str, why: str) -> Finding:
    """Return the finding for a key that can be dropped without loss."""
    return Finding("not_needed", key, why)


def unmapped(key: str, why: str) -> Finding:
    """Return the finding for a key without a counterpart; `why` includes what to do."""
    return Finding("unmapped", key, why)


def contradiction(key: str, other: str, why: str) -> Finding:
    """Return the finding for two keys that exclude each other."""
    return Finding("contradiction", f"{key} and {other}", why)


def read(key: str, target: str, value: Any, convert: Callable[[Any], Any], note: str = "") -> Finding:
    """Convert and map a value, or return why it cannot be converted."""
    try:
        return mapped(key, target, convert(value), note)
    except ValueError as err:
        return unmapped(key, str(err))


def number(value: Any) -> float:
    """Parse a number; PyYAML loads `1e-4` as a string.

    Raises:
        ValueError: The value is not a number.

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
    """Parse an integer.

    Raises:
        ValueError: The value is not an integer.

    Example:
        >>> whole(3.0), whole("1e3")
        (3, 1000)
    """
    found = number(value)
    if not found.is_integer():
        raise ValueError(f"{value!r} is not a whole number; write one into params.yaml")
    return int(found)


def switch(value: Any) -> bool:
    """Parse a boolean.

    Raises:
        ValueError: The value is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false; choose one in params.yaml")
    return value


def above_zero(value: Any) -> float | None:
    """Parse a number; 0 becomes None.

    Raises:
        ValueError: The value is not a number.
    """
    return number(value) or None


def steps(value: Any) -> int:
    """Parse a number of optimizer steps.

    Raises:
        ValueError: The value is a share of all steps, whose number is known only after packing.
    """
    if 0 < number(value) < 1:
        raise ValueError(f"{value} is a share of all steps; {AFTER_PACKING}")
    return whole(value)


AFTER_PACKING = (
    "steps are known after packing only: run `dvc repro pack` and divide packed_rows in "
    "data/pack/summary.json by num_processes x per_device_train_batch_size x "
    "gradient_accumulation_steps; that is one epoch"
)
