"""Row ledger: each stage must read exactly as many rows as the previous one wrote."""

from pathlib import Path
from typing import Any

from nightshift.core.errors import StageError
from nightshift.core.files import read_json
from nightshift.core.paths import DATA

# (reader, key of its entry) must equal (writer, key of its entry).
TRANSFERS = (
    (("dedupe", "rows_in"), ("ingest", "rows_out")),
    (("split", "rows_in"), ("dedupe", "rows_out")),
    (("augment", "rows_in"), ("split", "rows_out_by_side", "train")),
    (("decontaminate", "rows_in"), ("augment", "rows_out")),
    (("pack", "rows_in"), ("decontaminate", "rows_out")),
    (("sft", "rows_in"), ("pack", "packed_rows")),
)

# The stages that rows pass through before training, in order.
DATA_STAGES = (TRANSFERS[0][1][0], *(reader[0] for reader, _ in TRANSFERS[:-1]))


def check_ledger(data: Path = DATA) -> None:
    """Check that no row appears or disappears between two stages.

    Raises:
        StageError: Two entries differ; the message lists all differences.
    """
    found = []
    for reader, writer in TRANSFERS:
        read, written = entry(data, *reader), entry(data, *writer)
        if read != written:
            found.append(f"{'.'.join(reader)}={read}, but {'.'.join(writer)}={written}")
    if found:
        raise StageError(f"{data}: the ledger does not balance: {'; '.join(found)}; run `dvc repro --force`")


def entry(data: Path, stage: str, *keys: str) -> Any:
    """Return one value from a stage's summary."""
    value = read_json(data / stage / "summary.json")
    for key in keys:
        value = value[key]
    return value
