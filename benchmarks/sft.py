"""Run all benchmarks of training on a CPU: `make bench-sft`, most of an hour on two cores."""

import logging
import tempfile
from pathlib import Path

from benchmarks import memory, orchestration, throughput
from benchmarks.record import require_bounds, write_records
from nightshift.core.stage import run_main

PACKAGES = ("accelerate", "deepspeed", "dvc", "peft", "prefect", "torch", "transformers", "trl")
log = logging.getLogger(__name__)


def main() -> None:
    """Measure, write results/sft.json, and report claims that do not hold."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, ours, added = orchestration.measure(folder)
        log.info("ours: %.1f tokens/s", ours.tokens_per_second)
        records = [added, memory.of_job(job), *throughput.compare(folder, job, ours)]
    for one in records:
        log.info("%s: %.4g %s, bound %s", one["claim"], one["value"], one["unit"], one["bound"])
    write_records("sft", records, PACKAGES)
    require_bounds(records)


if __name__ == "__main__":
    run_main(main)
