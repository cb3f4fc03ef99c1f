"""Rows that a stage drops, by source and reason, and the rate above which it fails."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nightshift.core.errors import DataError

Rate = Annotated[float, Field(ge=0, le=1)]
# Fewer dropped rows are not a rate: two duplicates among three rows must not stop a night.
FEWEST = 10
# Number of dropped rows of a source in an error message.
SHOWN = 5


@dataclass(slots=True)
class Drops:
    """Counts of rows read and dropped.

    Attributes:
        read: Number of rows read, by source.
        dropped: Number of rows dropped, by source and reason.
        examples: Descriptions of the first dropped rows, by source.
    """

    read: Counter[str] = field(default_factory=Counter)
    dropped: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, source: str, reason: str, example: str) -> None:
        """Count a dropped row, and keep it as an example if it is one of the first."""
        self.dropped[source][reason] += 1
        if len(self.examples[source]) < SHOWN:
            self.examples[source].append(example)

    def by_reason(self) -> Counter[str]:
        """Return reason -> rows, summed over all sources."""
        return sum(self.dropped.values(), Counter())

    def by_source(self) -> dict[str, dict[str, int]]:
        """Return source -> reason -> rows, sorted."""
        return {source: dict(sorted(self.dropped[source].items())) for source in sorted(self.dropped)}

    def kept_by_source(self) -> dict[str, int]:
        """Return source -> rows that are not dropped, sorted."""
        lost = {source: counts.total() for source, counts in self.dropped.items()}
        return {source: self.read[source] - lost.get(source, 0) for source in sorted(self.read)}


def require_drop_rate(
    drops: Drops,
    limit: float,
    where: tuple[Path, str],
    remedy: str,
    *,
    harmless: Collection[str] = (),
    fewest: int = FEWEST,
) -> None:
    """Fail if a stage drops too many rows, of all sources together or of one source.

    Fewer than `FEWEST` dropped rows of a source are accepted, unless they are all of its rows.

    Args:
        drops: Counts of rows read and dropped.
        limit: Maximum drop rate, 0 to 1; 1 accepts everything.
        where: File that lists the dropped rows, and parameter that holds the limit.
        remedy: Suggested fix, besides raising the limit.
        harmless: Reasons whose rows are not counted, because nothing is lost with them.
        fewest: Same as `FEWEST`, for all sources together.

    Raises:
        DataError: The rate is above the limit; the message lists each source with some of its rows.
    """
    excesses = dict(find_excesses(drops, limit, harmless, fewest))
    if not excesses:
        return
    sources = sorted(drops.examples) if "all sources" in excesses else list(excesses)
    shown = [example for source in sources for example in drops.examples[source]]
    file, key = where
    first = f"{file}: {'; '.join(excesses.values())}, more than {key}={limit}; {remedy}, or raise the limit"
    raise DataError("\n  ".join([first, *shown]))


def find_excesses(
    drops: Drops, limit: float, harmless: Collection[str], fewest: int
) -> Iterator[tuple[str, str]]:
    """Yield (name, message) for each group that loses too many rows: all sources, or one of several."""
    sources = sorted(drops.read)
    single = [(source, [source], FEWEST) for source in sources if len(sources) > 1]
    for name, members, least in (("all sources", sources, fewest), *single):
        dropped = sum((drops.dropped.get(source, Counter()) for source in members), Counter[str]())
        lost = {reason: count for reason, count in sorted(dropped.items()) if reason not in harmless}
        count = sum(lost.values())
        rows = sum(drops.read[source] for source in members) - dropped.total() + count
        if count > limit * rows and (count >= least or count == rows):
            reasons = ", ".join(f"{reason} {number}" for reason, number in lost.items())
            yield name, f"{count} of {rows} rows of {name} are dropped ({reasons})"
