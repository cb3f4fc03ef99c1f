"""Run the stage: one pass over all shards, three output files."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from nightshift.core.config import load_params
from nightshift.core.errors import DataError
from nightshift.core.files import atomic_write, write_rows
from nightshift.core.paths import BASE, INGESTED, PII, QUARANTINE, RAW
from nightshift.core.stage import run_main, write_summary
from nightshift.data.drops import Drops, require_drop_rate
from nightshift.data.encode import Encoder, load_encoder
from nightshift.data.schemas import EXAMPLES
from nightshift.data.tokens import open_memo
from nightshift.raw.checks import compile_special_tokens
from nightshift.raw.faults import RowError
from nightshift.raw.pii import find_pii
from nightshift.raw.streams import Limits
from tasks.ingest import IngestParams
from tasks.ingest.lengths import describe, measure, special_tokens
from tasks.ingest.presidio import load_presidio
from tasks.ingest.rows import Example, Outcome, Privacy, read_outcomes


@dataclass(slots=True)
class Tally:
    """Counts over all rows.

    Attributes:
        drops: Rows read and quarantined.
        repaired: Repaired rows, by repair.
        pii: Findings of personal data, by (source, kind).
        tokens: Token count of each example.
    """

    drops: Drops = field(default_factory=Drops)
    repaired: Counter[str] = field(default_factory=Counter)
    pii: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: "array[int]" = field(default_factory=lambda: array("I"))


def main() -> None:
    """Write examples, quarantine and personal-data report; fail if too many rows are bad."""
    params = load_params(IngestParams, "ingest")
    encoder = load_encoder(BASE)
    tally = Tally()
    # The quarantine is written even if the examples are not.
    with atomic_write(INGESTED) as examples:
        write_outputs(examples, params, encoder, tally)
        require_rows(tally.drops, params.max_drop_rate)
    write_summary(
        "ingest",
        rows_in=tally.drops.read.total(),
        rows_out=len(tally.tokens),
        dropped=tally.drops.by_reason(),
        dropped_by_source=tally.drops.by_source(),
        repaired=dict(sorted(tally.repaired.items())),
        tokens=describe(tally.tokens),
        pii=by_source(tally.pii),
    )


def write_outputs(examples: Path, params: IngestParams, encoder: Encoder, tally: Tally) -> None:
    """Read all shards once; write each row to its output file."""
    limits = Limits(params.max_row_bytes, params.max_shard_bytes, params.max_compression_ratio)
    special = compile_special_tokens(special_tokens(encoder))
    privacy = Privacy(params.pii, load_presidio(params.pii_model) if params.pii_model else find_pii)
    with (
        open_memo(encoder) as memo,
        atomic_write(QUARANTINE) as quarantine,
        atomic_write(PII) as pii,
        quarantine.open("w", encoding="utf-8") as bad,
        pii.open("w", encoding="utf-8") as personal,
    ):
        outcomes = read_outcomes(RAW, limits, special, privacy)
        measured = measure(outcomes, encoder, memo, params.max_tokens)
        write_rows(examples, separate(measured, bad, personal, tally), EXAMPLES)


def separate(
    measured: Iterable[tuple[Outcome, int]], bad: TextIO, personal: TextIO, tally: Tally
) -> Iterator[Example]:
    """Yield the examples; write faults to `bad` and positions of personal data to `personal`."""
    for outcome, tokens in measured:
        tally.drops.read[outcome.source] += 1
        for span in outcome.pii_spans:
            tally.pii[outcome.source, span.kind] += 1
            write_line(personal, {"origin": outcome.origin, **asdict(span)})
        if isinstance(outcome.result, RowError):
            fault = outcome.result
            row = {"origin": outcome.origin, "reason": fault.reason, "remedy": fault.remedy}
            write_line(bad, row)
            line = f"{RAW}/{outcome.origin}: {fault.reason}; {fault.remedy}"
            tally.drops.add(outcome.source, fault.reason, line)
            continue
        tally.repaired.update(outcome.repaired)
        tally.tokens.append(tokens)
        yield outcome.result


def write_line(file: TextIO, row: dict[str, Any]) -> None:
    """Write one row of JSON Lines with sorted keys."""
    file.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")


def by_source(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Convert (source, kind) -> count to source -> kind -> count.

    Example:
        >>> by_source(Counter({("chats", "email"): 2}))
        {'chats': {'email': 2}}
    """
    nested: dict[str, dict[str, int]] = {}
    for (source, kind), count in sorted(counts.items()):
        nested.setdefault(source, {})[kind] = count
    return nested


def require_rows(drops: Drops, limit: float) -> None:
    """Fail if there are no rows, or too many bad rows overall or in a source.

    A source may still be empty: an empty file is recorded but is not a bad row.

    Raises:
        DataError: There are no rows, or the rate of bad rows is above `limit`.
    """
    if drops.read.total() == drops.by_reason()["empty_file"]:
        raise DataError(f"{RAW}: no rows; run `nightshift snapshot` or check snapshot.sources")
    require_drop_rate(
        drops,
        limit,
        (QUARANTINE, "ingest.max_drop_rate"),
        "fix the rows, remove the source from snapshot.sources",
        harmless=("empty_file",),
        fewest=1,
    )


if __name__ == "__main__":
    run_main(main)
