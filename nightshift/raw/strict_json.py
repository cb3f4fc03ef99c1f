"""Standard JSON: no NaN, no Infinity; sorted keys when written."""

import json
import math
from typing import Any


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is malformed, or contains NaN or a number beyond the range of a float.
        RecursionError: The nesting is too deep.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


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
