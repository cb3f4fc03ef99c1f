"""`nightshift benchmarks`: how the last candidates answered, and which items say nothing about them."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nightshift.core.errors import ConfigError, GateError
from nightshift.core.files import read_rows
from nightshift.data.schemas import Score
from nightshift.registry.items import History, find_histories
from nightshift.registry.lineage import open_lineage
from nightshift.registry.versions import open_registry, registered

KINDS = ("never right", "always right", "unstable")
MEANINGS = {
    "never right": "too hard, or its reference answer is wrong",
    "always right": "tells no candidate from another",
    "unstable": "changes from night to night by chance",
}


def show(console: Console, name: str, nights: int) -> None:
    """Print a table of all benchmarks, or the items of one that are worth a look.

    Raises:
        ConfigError: No version has scores, or none on this benchmark.
    """
    tables = list(read_tables(console, nights))
    found = find_histories(tables)
    if not found:
        raise ConfigError("registry: no version has scores on a benchmark; `nightshift run` registers one")
    if not name:
        console.print(summarize(found))
        console.print(f"{len(tables)} candidate(s); `nightshift benchmarks NAME` lists the items")
        return
    if name not in found:
        raise ConfigError(f"{name}: the last version has no scores on it; benchmarks: {', '.join(found)}")
    for kind in KINDS:
        items = [one for one in found[name] if one.kind == kind]
        if items and kind != "always right":
            console.print(f"\n{kind} ({MEANINGS[kind]}):")
            console.print(list_items(items))
        elif items:
            console.print(f"\n{kind} ({MEANINGS[kind]}): {len(items):,} items")


def read_tables(console: Console, nights: int) -> Iterator[Sequence[Score]]:
    """Yield the score tables of the last versions, oldest first; name the versions that have none."""
    client, name = open_registry()
    for version in registered(client, name)[-nights:]:
        try:
            with open_lineage(name, int(version.version), "scores.parquet") as file:
                rows: list[Score] = read_rows(file)
                yield rows
        except GateError:
            console.print(f"version {version.version} has no scores: it is left out")


def summarize(found: dict[str, list[History]]) -> Table:
    """Return a table with a line for each benchmark."""
    table = Table("benchmark", "items", "first", "last", *KINDS, box=None)
    for name, items in sorted(found.items()):
        ends = (f"{sum(one.scores[i] for one in items) / len(items):.1%}" for i in (0, -1))
        counts = (str(sum(one.kind == kind for one in items)) for kind in KINDS)
        table.add_row(name, f"{len(items):,}", *ends, *counts)
    return table


def list_items(items: Sequence[History]) -> Table:
    """Return a table of items with their question, reference answer and scores."""
    table = Table("item", "question", "expected", "scores", box=None)
    for one in items:
        scores = " ".join(f"{score:g}" for score in one.scores)
        table.add_row(escape(one.item), escape(one.question), escape(one.expected or ""), scores)
    return table
