"""Standard JSON: no NaN, no Infinity, no key twice; sorted keys when written."""

import json
import math
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a key twice, of which most parsers use the last one."""


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is malformed, or contains NaN, a number beyond the range of a float, or a key
            twice.
        RecursionError: The nesting is too deep.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique)


def loads_row(text: str) -> Any:
    """Parse a row, with NaN and Infinity: they are a fault only in a value that is used.

    Raises:
        ValueError: The text is malformed, or contains a key twice.
        RecursionError: The nesting is too deep.
    """
    return json.loads(text, object_pairs_hook=_unique)


def dumps(value: object) -> str:
    """Write JSON with sorted keys, so equal values give equal text.

    Raises:
        TypeError: JSON cannot represent the type.
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _finite(text: str) -> float:
    """Parse a finite number."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a valid JSON number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object whose keys occur once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKeyError(next(key for key in found if sum(key == other for other, _ in pairs) > 1))
    return found
