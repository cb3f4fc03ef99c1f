"""JSON as its standard says: no NaN and no Infinity; keys sorted when written."""

import json
import math
from typing import Any


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is malformed, or holds a number that is NaN or beyond the range of a float.
        RecursionError: It is nested too deep.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def dumps(value: object) -> str:
    """Write JSON, keys sorted, so that equal values give equal text.

    Raises:
        TypeError: JSON has no such type.
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _finite(text: str) -> float:
    """Read a number that JSON can write again."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number
