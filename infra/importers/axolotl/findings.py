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


def convert_value(
    key: str, target: str, value: Any, convert: Callable[[Any], Any], note: str = ""
) -> Finding:
    """Convert and map a value, or return why it cannot be converted."""
    try:
        return mapped(key, target, convert(value), note)
    except ValueError as err:
        return unmapped(key, str(err))


def parse_float(value: Any) -> float:
    """Parse a number; PyYAML loads `1e-4` as a string.

    Raises:
        ValueError: The value is not a number.

    Example:
        >>> parse_float("1e-4"), parse_float(2)
        (0.0001, 2.0)
    """
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{value!r} is not a number; correct it")


def parse_int(value: Any) -> int:
    """Parse an integer.

    Raises:
        ValueError: The value is not an integer.

    Example:
        >>> parse_int(3.0), parse_int("1e3")
        (3, 1000)
    """
    found = parse_float(value)
    if not found.is_integer():
        raise ValueError(f"{value!r} is not an integer; set an integer in params.yaml")
    return int(found)


def parse_bool(value: Any) -> bool:
    """Parse a boolean.

    Raises:
        ValueError: The value is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false; choose one in params.yaml")
    return value


def parse_nonzero(value: Any) -> float | None:
    """Parse a number; 0 becomes None.

    Raises:
        ValueError: The value is not a number.
    """
    return parse_float(value) or None


def parse_steps(value: Any) -> int:
    """Parse a number of optimizer steps.

    Raises:
        ValueError: The value is a share of all steps, whose number is known only after packing.
    """
    if 0 < parse_float(value) < 1:
        raise ValueError(f"{value} is a share of all steps; {AFTER_PACKING}")
    return parse_int(value)


AFTER_PACKING = (
    "the number of steps is known only after packing: run `dvc repro pack` and divide packed_rows in "
    "data/pack/summary.json by num_processes x per_device_train_batch_size x "
    "gradient_accumulation_steps to get the steps of one epoch"
)
