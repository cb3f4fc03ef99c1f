"""Run all benchmarks of the data preparation: `make bench-data`, half an hour on two cores."""

import logging
import tempfile
from pathlib import Path

from benchmarks import dedupe, increment, scale
from benchmarks.record import require_bounds, write_records
from nightshift.core.stage import run_main

PACKAGES = ("daft", "datasketch", "datatrove", "rensa", "pyarrow", "tokenizers", "transformers", "trl")
log = logging.getLogger(__name__)


def main() -> None:
    """Measure, write results/data.json, and report claims that do not hold."""
    records = []
    for module in (dedupe, scale, increment):
        with tempfile.TemporaryDirectory() as folder:
            records += module.measure(Path(folder))
        for one in records:
            log.info("%s: %.4g %s, bound %s", one["claim"], one["value"], one["unit"], one["bound"])
        write_records("data", records, PACKAGES)
    require_bounds(records)


if __name__ == "__main__":
    run_main(main)
