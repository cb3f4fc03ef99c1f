"""Run the stage: one pass over all shards, five output files."""

import json
import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from nightshift.core.config import load_params
from nightshift.core.errors import DataError
from nightshift.core.files import ROWS_PER_BATCH, appended_rows, atomic_write, jsonl, write_rows
from nightshift.core.paths import BASE, COMPARED, INGESTED, PII, QUARANTINE, RAW, REPAIRS
from nightshift.core.stage import run_main, write_summary
from nightshift.core.workers import start_workers
from nightshift.data.drops import Drops, require_drop_rate
from nightshift.data.encode import Encoder, load_encoder
from nightshift.data.schemas import EXAMPLES, PREFERENCES
from nightshift.data.tokens import open_memo
from nightshift.raw.checks import compile_special_tokens
from nightshift.raw.columns import is_harmless
from nightshift.raw.faults import RowError
from nightshift.raw.pii import find_pii
from nightshift.raw.selection import Selection
from nightshift.raw.shards import used_shards
from nightshift.raw.streams import Limits
from tasks.ingest import IngestParams
from tasks.ingest.lengths import describe, special_tokens, start_conversion
from tasks.ingest.presidio import load_presidio
from tasks.ingest.rows import Example, Measured, Outcome, Privacy, Rules, read_outcomes

log = logging.getLogger(__name__)
# Size of the shards, compressed or not, from which rows are converted on all CPU cores, and rows that a
# process converts at once.
MANY_BYTES = 32 * 2**20
ROWS_PER_WORK = 500
# Examples of each repair, and names of ignored columns of a source. Rows may be maps with a key for each.
EXAMPLES_PER_REPAIR = 3
MAX_COLUMNS = 100
# Reasons of rows that are left out as intended.
HARMLESS_DROPS = ("empty_file", "rejected_answer")


@dataclass(slots=True)
class Tally:
    """Counts over all rows.

    Attributes:
        drops: Rows read and quarantined.
        repaired: Repaired rows, by repair.
        repairs: The first places that each repair changed.
        ignored: Rows with a column that is not read, by source and column.
        pii: Findings of personal data, by (source, kind).
        tokens: Token count of each example.
        compared: Rows for preference tuning, by what they give: pairs, chosen or rejected.
    """

    drops: Drops = field(default_factory=Drops)
    repaired: Counter[str] = field(default_factory=Counter)
    repairs: list[dict[str, str]] = field(default_factory=list)
    ignored: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    pii: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    compared: Counter[str] = field(default_factory=Counter)


def main() -> None:
    """Write examples, quarantine and personal-data report; fail if too many rows are bad."""
    params = load_params(IngestParams, "ingest")
    encoder = load_encoder(BASE)
    tally, selection = Tally(), Selection(RAW)
    # The quarantine is written even if the examples are not.
    with atomic_write(INGESTED) as examples:
        write_outputs(examples, params, encoder, tally, selection)
        selection.require_groups()
        require_rows(tally.drops, params.max_drop_rate)
    warn_of_columns(tally.ignored)
    more: dict[str, Any] = {"compared": dict(sorted(tally.compared.items()))} if tally.compared else {}
    write_summary(
        "ingest",
        rows_in=tally.drops.read.total(),
        rows_out=len(tally.tokens),
        dropped=tally.drops.by_reason(),
        dropped_by_source=tally.drops.by_source(),
        rows_out_by_source=tally.drops.kept_by_source(),
        repaired=dict(sorted(tally.repaired.items())),
        ignored_columns={
            source: dict(sorted(counts.items())) for source, counts in sorted(tally.ignored.items())
        },
        tokens=describe(tally.tokens),
        pii=by_source(tally.pii),
        **more,
        **selection.counts(),
    )


def write_outputs(
    examples: Path, params: IngestParams, encoder: Encoder, tally: Tally, selection: Selection
) -> None:
    """Read all shards once; write each row to its output file."""
    limits = Limits(params.max_row_bytes, params.max_shard_bytes, params.max_compression_ratio)
    special = compile_special_tokens(special_tokens(encoder))
    privacy = Privacy(params.pii, load_presidio(params.pii_model) if params.pii_model else find_pii)
    has_reasoning = encoder.template is not None and encoder.template.has_reasoning
    rules = Rules(special, privacy, params.fix_encoding, has_reasoning)
    start = partial(start_conversion, rules, encoder, params.max_tokens)
    # Each process would load the spaCy model.
    is_large = (
        privacy.find is find_pii and sum(path.stat().st_size for _, path in used_shards(RAW)) > MANY_BYTES
    )
    with (
        # Emptied here if another method filled it, before several processes open it.
        open_memo(encoder),
        start_workers("ingest", start, is_large=is_large, batch=ROWS_PER_WORK) as convert_all,
        atomic_write(REPAIRS) as repairs,
        atomic_write(QUARANTINE) as quarantine,
        atomic_write(PII) as pii,
        appended_rows(COMPARED, PREFERENCES) as append,
        quarantine.open("w", encoding="utf-8") as bad,
        pii.open("w", encoding="utf-8") as personal,
    ):
        counted = (
            one
            for one in read_outcomes(RAW, limits, convert_all, selection)
            if not selection.is_mended(one[0].origin.rpartition(":")[0], one[0].result)
        )
        outcomes = keep_compared(counted, append, tally)
        write_rows(examples, separate(outcomes, bad, personal, tally), EXAMPLES)
        shown = tally.repairs if params.pii != "redact" else []
        repairs.write_text(jsonl(shown), encoding="utf-8")


def keep_compared(
    measured: Iterable[Measured], append: Callable[[Sequence[Mapping[str, Any]]], None], tally: Tally
) -> Iterator[Measured]:
    """Yield all outcomes, and write what preference tuning learns from them.

    A row that is refused as an example is refused here too, unless it only has a bad answer.
    """
    batch: list[dict[str, Any]] = []
    for outcome, tokens in measured:
        row, fault = outcome.compared, outcome.result
        if row and not (isinstance(fault, RowError) and fault.reason != "rejected_answer"):
            kind = "pairs" if row["chosen"] and row["rejected"] else "chosen" if row["chosen"] else "rejected"
            tally.compared[kind] += 1
            batch.append(row)
        if len(batch) == ROWS_PER_BATCH:
            append(batch)
            batch = []
        yield outcome, tokens
    append(batch)


def separate(measured: Iterable[Measured], bad: TextIO, personal: TextIO, tally: Tally) -> Iterator[Example]:
    """Yield the examples; write faults to `bad` and positions of personal data to `personal`."""
    for outcome, tokens in measured:
        tally.drops.read[outcome.source] += 1
        for span in outcome.pii_spans:
            tally.pii[outcome.source, span.kind] += 1
            write_line(personal, {"origin": outcome.origin, **asdict(span)})
        if isinstance(outcome.result, RowError):
            fault = outcome.result
            row = {"origin": outcome.origin, "reason": fault.reason, "remedy": fault.remedy}
            if not outcome.compared:
                write_line(bad, row)
            line = f"{RAW}/{outcome.origin}: {fault.reason}; {fault.remedy}"
            tally.drops.add(outcome.source, fault.reason, line)
            continue
        count_changes(outcome, tally)
        tally.tokens.append(tokens)
        yield outcome.result


def count_changes(outcome: Outcome, tally: Tally) -> None:
    """Count the repairs of a row and the columns that were not read; keep the first examples."""
    for name, (before, after) in outcome.repaired.items():
        tally.repaired[name] += 1
        known = sum(one["repair"] == name for one in tally.repairs)
        # An example is text of the row, which must not spread personal data.
        if known < EXAMPLES_PER_REPAIR and not outcome.pii_spans:
            row = {"repair": name, "origin": outcome.origin, "before": before, "after": after}
            tally.repairs.append(row)
    counts = tally.ignored[outcome.source] if outcome.ignored else Counter[str]()
    for column in sorted(outcome.ignored):
        counts[column if column in counts or len(counts) < MAX_COLUMNS else "(other columns)"] += 1


def warn_of_columns(ignored: Mapping[str, Counter[str]]) -> None:
    """Log the columns of each source that were not read, except those that only describe a row."""
    for source, counts in sorted(ignored.items()):
        names = [f"{name} ({rows:,} rows)" for name, rows in sorted(counts.items()) if not is_harmless(name)]
        if names:
            log.warning("%s: columns that are not read: %s", source, ", ".join(names))


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

    A source may still be empty: an empty file is recorded but is not a bad row. Neither is a rejected answer.

    Raises:
        DataError: There are no rows, or the rate of bad rows is above `limit`.
    """
    if drops.read.total() == sum(drops.by_reason()[reason] for reason in HARMLESS_DROPS):
        raise DataError(f"{RAW}: no rows; run `nightshift snapshot` or check snapshot.sources")
    require_drop_rate(
        drops,
        limit,
        (QUARANTINE, "ingest.max_drop_rate"),
        "fix the rows in their file and run `nightshift snapshot` (bad rows of its older version no longer "
        "count), remove the source from snapshot.sources",
        harmless=HARMLESS_DROPS,
        fewest=1,
    )


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
