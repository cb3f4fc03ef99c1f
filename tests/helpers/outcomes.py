"""What ingest makes of the rows of all shards, before their tokens are counted."""

from pathlib import Path

from nightshift.raw.selection import Selection
from nightshift.raw.streams import Limits
from tasks.ingest.rows import Outcome, Rules, convert_row, read_outcomes


def convert_shards(raw: Path, limits: Limits, rules: Rules) -> list[Outcome]:
    """Return the outcome of every row."""
    measured = read_outcomes(
        raw, limits, lambda tasks: ((convert_row(*task, rules), 0) for task in tasks), Selection(raw)
    )
    return [outcome for outcome, _ in measured]
