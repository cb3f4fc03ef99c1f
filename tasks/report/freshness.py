"""Section of the report on how champions age: their loss on the test examples that were new, by night."""

from collections.abc import Sequence

from nightshift.registry.freshness import MIN_NIGHTS, Night, find_half_life
from tasks.report.chart import Chart, draw


def draw_freshness(nights: Sequence[Night]) -> Chart | None:
    """Draw the losses on the new test examples of each night; None without nights."""
    curves = {
        "champion": [(night.version, night.champion) for night in nights],
        "new model": [(night.version, night.candidate) for night in nights],
        "base": [(night.version, night.base) for night in nights],
    }
    return draw("Loss on the new test examples, in nats per token", curves, step="version")


def describe_freshness(nights: Sequence[Night]) -> str:
    """Describe the last night, and the half-life of a champion.

    Example:
        >>> nights = [Night(n, age, 3.0, 3.0 - 2 ** (-age / 8), 2.0) for n, age in enumerate([1, 1, 2, 4, 9])]
        >>> print(describe_freshness(nights))
        Version 4 has a loss of 2.000 on the test examples that are newer than the champion, which has 2.541 \
at an age of 9.0 days. Champions lose half of their advantage over the base in 8.0 days (5 nights).
        >>> print(describe_freshness(nights[:1]))
        Version 0 has a loss of 2.000 on the test examples that are newer than the champion, which has 2.083 \
at an age of 1.0 days. How fast champions age is known after 5 nights (1 so far).
    """
    last, half_life = nights[-1], find_half_life(nights)
    if half_life is not None:
        ageing = (
            f"Champions lose half of their advantage over the base in {half_life:.1f} days "
            f"({len(nights)} nights)."
        )
    elif len(nights) < MIN_NIGHTS:
        ageing = f"How fast champions age is known after {MIN_NIGHTS} nights ({len(nights)} so far)."
    else:
        ageing = f"Champions lost no advantage over the base in {len(nights)} nights."
    return (
        f"Version {last.version} has a loss of {last.candidate:.3f} on the test examples that are newer than "
        f"the champion, which has {last.champion:.3f} at an age of {last.age:.1f} days. {ageing}"
    )
