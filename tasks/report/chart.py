"""Layout of the curves for the template's SVG, whose colours follow the page's, light or dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# In SVG units; on a phone, one unit is about one pixel.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 36
# Points per line, at most; neighbours are averaged above that.
MAX_POINTS = 300
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        label: Label of the curve.
        points: (x, y) positions in the drawing.
        per_point: Number of values averaged into one point.
    """

    label: str
    points: list[tuple[float, float]]
    per_point: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the same steps.

    Attributes:
        title: Title, with the unit.
        description: Text description, for screen readers.
        step: What a step is, such as "optimizer step".
        lines: Curves.
        across: (position, label) of the step ticks.
        up: (position, label) of the value ticks.
    """

    title: str
    description: str
    step: str
    lines: list[Line]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def draw(
    title: str, curves: Mapping[str, Curve], *, step: str = "optimizer step", from_zero: bool = False
) -> Chart | None:
    """Lay out curves of (step, value); return None if there are no points.

    Args:
        title: Title, with the unit.
        curves: Label -> points, in step order. Values that are not finite are left out.
        step: What a step is.
        from_zero: Whether the value axis starts at 0.
    """
    finite = {name: [at for at in curve if math.isfinite(at[1])] for name, curve in curves.items()}
    lines = {name: thin(curve) for name, curve in finite.items() if curve}
    if not lines:
        return None
    every = [at for points, _ in lines.values() for at in points]
    steps, values = [step for step, _ in every], [value for _, value in every]
    first, last = min(steps), max(steps)
    low, high = (0.0 if from_zero else min(values)), max(values)
    across = Axis(first, last, LEFT, WIDTH - RIGHT)
    up = Axis(low, high, HEIGHT - BOTTOM, TOP)
    return Chart(
        title,
        "; ".join(describe(name, finite[name], step) for name in lines),
        step,
        [
            Line(name, [(across.place(x), up.place(y)) for x, y in points], n)
            for name, (points, n) in lines.items()
        ],
        [(across.place(tick), f"{tick:,.0f}") for tick in ticks(first, last) if tick == round(tick)],
        [(up.place(tick), f"{tick:g}") for tick in ticks(low, high)],
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """Linear axis between two ends of the drawing; a single value is placed in the middle."""

    low: float
    high: float
    begin: float
    end: float

    def place(self, value: float) -> float:
        """Return the position of a value."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.begin + share * (self.end - self.begin), 1)


def thin(curve: Curve) -> tuple[Curve, int]:
    """Average neighbours down to at most `MAX_POINTS`; return the points and the values per point.

    Example:
        >>> thin([(1, 2.0), (2, 4.0)])
        ([(1, 2.0), (2, 4.0)], 1)
        >>> points, size = thin([(step, 1.0) for step in range(601)])
        >>> len(points), size
        (201, 3)
    """
    size = math.ceil(len(curve) / MAX_POINTS)
    if size == 1:
        return curve, 1
    bins = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in bins], size


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round values between two ends.

    Example:
        >>> ticks(0.0, 0.002), ticks(1, 234), ticks(2.0, 2.0)
        ([0.0, 0.0005, 0.001, 0.0015, 0.002], [50, 100, 150, 200], [2.0])
    """
    if high <= low:
        return [low]
    exact = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(exact))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= exact * (1 - 1e-9))
    numbers = range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)
    found = [number * width for number in numbers]
    return [round(value) if width >= 1 else float(f"{value:.12g}") for value in found]


def describe(name: str, curve: Curve, step: str) -> str:
    """Describe a curve in words.

    Example:
        >>> describe("loss", [(1, 3.0), (2, 1.5), (3, 2.0)], "version")
        'loss: 3 at version 1, lowest 1.5 at version 2, 2 at version 3'
    """
    lowest = min(curve, key=lambda at: at[1])
    points = ((curve[0], ""), (lowest, "lowest "), (curve[-1], ""))
    return f"{name}: " + ", ".join(f"{word}{value:.4g} at {step} {x:.0f}" for (x, value), word in points)
