"""Findings for the keys of a config file of another tool, and converters for their values."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from nightshift.core.config import suggestion

Config = Mapping[str, Any]
DEFAULT = "the tool's default"


@dataclass(frozen=True, slots=True)
class Finding:
    """Import result of one key.

    Attributes:
        kind: mapped: the key sets `target`; not_needed: nothing is lost; unmapped: the user must decide;
            contradiction: two keys of the file conflict.
        key: Key of the file.
        note: Reason, and what to do.
        target: `section.key` of params.yaml that the key sets, or whose current value holds instead.
        value: Value of the target, if the key is mapped.
        is_default: Whether the key is missing from the file, so that the tool's default applies.
        is_essential: Whether another base, other data or another objective would be trained instead.
    """

    kind: Literal["mapped", "not_needed", "unmapped", "contradiction"]
    key: str
    note: str = ""
    target: str = ""
    value: Any = None
    is_default: bool = False
    is_essential: bool = False


Findings = Iterator[Finding]


def split_empty(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return the keys with a value, and the names of the others.

    Example:
        >>> split_empty({"seed": 0, "adapter": None, "tokens": []})
        ({'seed': 0}, ['adapter', 'tokens'])
    """
    empty = [key for key, value in config.items() if value is None or value in ("", [], {})]
    return {key: value for key, value in config.items() if key not in empty}, empty


def match(key: str, table: Mapping[str, str]) -> str | None:
    """Return the entry of a key, or of the pattern that it matches, or None."""
    return table.get(key) or next((why for name, why in table.items() if fnmatchcase(key, name)), None)


def unknown(key: str, tool: str, known: Collection[str]) -> Finding:
    """Return the finding for a key that the tool does not have."""
    near = suggestion(key, sorted(known))
    return unmapped(key, f"unknown to {tool}; {near if near.startswith('did') else 'remove it'}")


def mapped(key: str, target: str, value: Any, note: str = "") -> Finding:
    """Return the finding for a key that sets `section.key`."""
    return Finding("mapped", key, note, target, value)


def default(key: str, target: str, value: Any, note: str = DEFAULT) -> Finding:
    """Return the finding for a missing key whose default sets `section.key`."""
    return Finding("mapped", key, note, target, value, is_default=True)


def not_needed(key: str, why: str) -> Finding:
    """Return the finding for a key that can be dropped without loss."""
    return Finding("not_needed", key, why)


def unmapped(key: str, why: str, target: str = "") -> Finding:
    """Return the finding for a key without a counterpart; `why` includes what to do."""
    return Finding("unmapped", key, why, target)


def essential(key: str, why: str, target: str = "") -> Finding:
    """Return the finding for a base, data or objective that cannot be mapped, so nothing is written."""
    return Finding("unmapped", key, why, target, is_essential=True)


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
        return unmapped(key, str(err), target)


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


def parse_interval(value: Any) -> int | float | None:
    """Parse a number of optimizer steps, or a share below 1 of all steps; 0 (never) becomes None.

    Raises:
        ValueError: The value is neither.

    Example:
        >>> parse_interval(50), parse_interval("0.25"), parse_interval(0)
        (50, 0.25, None)
    """
    number = parse_float(value)
    return number if 0 < number < 1 else parse_int(value) or None


def share_of_steps(per_epoch: Any, epochs: Any) -> float | None:
    """Return the interval of something done so many times per epoch, as a share of all steps.

    Returns:
        The share; None if it is done only at the end.

    Raises:
        ValueError: A value is not a number.

    Example:
        >>> share_of_steps(4, 2), share_of_steps(1, 1)
        (0.125, None)
    """
    times = parse_float(per_epoch) * parse_float(epochs)
    return 1 / times if times > 1 else None
