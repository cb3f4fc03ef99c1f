"""Run the stage: find the training rows that overlap with evaluation questions, and write the others."""

import logging
from collections import Counter
from functools import partial

import pyarrow as pa

from nightshift.core.config import load_params
from nightshift.core.files import data_size, iterate_batches, iterate_rows, write_batches, write_rows
from nightshift.core.paths import (
    AUGMENTED_TRAIN,
    BENCHMARKS,
    CLEAN_TRAIN,
    CLUSTERS,
    HITS,
    PLACED,
    PREFERENCES,
    TEST,
)
from nightshift.core.stage import run_main, write_summary
from nightshift.core.workers import start_workers
from nightshift.data.benchmarks import HELDOUT, evaluation_questions
from nightshift.data.clusters import CLUSTERS_SCHEMA, find_clusters
from nightshift.data.drops import Drops, require_drop_rate
from nightshift.data.schemas import AUGMENTED, PLACED_PREFERENCES
from nightshift.data.text import read_form
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate.hits import HITS_SCHEMA, describe_hit, find_hits
from tasks.decontaminate.index import build_index
from tasks.decontaminate.overlaps import COLUMNS, start_search
from tasks.decontaminate.preferences import Comparisons, batches_of_rejected

# Size of the rows from which they are searched on all CPU cores, and rows that a process searches at once.
MANY_BYTES = 64 * 2**20
ROWS_PER_WORK = 1000
log = logging.getLogger(__name__)


def main() -> None:
    """Write the clean training rows and a report of all hits."""
    params = load_params(DecontaminateParams, "decontaminate")
    questions = [(one, read_form(one.text)) for one in evaluation_questions(TEST, BENCHMARKS)]
    in_benchmarks = [asked for asked in questions if asked[0].benchmark != HELDOUT]
    benchmarks = build_index(in_benchmarks, params, is_test=False)
    in_test = [asked for asked in questions if asked[0].benchmark == HELDOUT]
    test = build_index(in_test, params, is_test=True)
    start = partial(start_search, benchmarks.passages, test.passages, params)
    is_large = data_size(AUGMENTED_TRAIN) > MANY_BYTES
    with start_workers("decontaminate", start, is_large=is_large, batch=1) as search_all:
        # The workers start meanwhile.
        write_rows(CLUSTERS, find_clusters(questions, params), CLUSTERS_SCHEMA)
        found = list(search_all(iterate_batches(AUGMENTED_TRAIN, COLUMNS, ROWS_PER_WORK)))
        found_rejected = list(search_all(batches_of_rejected(PLACED, ROWS_PER_WORK)))
    drops = Drops()
    for one in found:
        drops.read.update(one.sources)
    hits = find_hits(found, benchmarks, test, params)
    for source, hit in hits.values():
        drops.add(source, hit["reason"], describe_hit(hit))
    # What many training rows share is no overlap of a rejected answer either.
    known = [one._replace(rows=[]) for one in found]
    hits_of_rejected = find_hits([*known, *found_rejected], benchmarks, test, params)
    write_rows(HITS, (hit for _, hit in [*hits.values(), *hits_of_rejected.values()]), HITS_SCHEMA)
    require_drop_rate(
        drops,
        params.max_drop_rate,
        (HITS, "decontaminate.max_drop_rate"),
        "see the overlaps in this file, remove them from the rows or from snapshot.benchmarks",
    )
    warn_of_hits(drops)
    clean = (
        batch.filter(pa.array([id_ not in hits for id_ in batch["id"].to_pylist()]))
        for batch in iterate_batches(AUGMENTED_TRAIN)
    )
    write_batches(CLEAN_TRAIN, clean, AUGMENTED)
    trained = (id_ for batch in iterate_batches(CLEAN_TRAIN, ["id"]) for id_ in batch["id"].to_pylist())
    comparisons = Comparisons(frozenset(trained), hits_of_rejected)
    write_rows(PREFERENCES, comparisons.select(iterate_rows(PLACED)), PLACED_PREFERENCES)
    write_summary(
        "decontaminate",
        rows_in=drops.read.total(),
        rows_out=drops.read.total() - len(hits),
        dropped=drops.by_reason(),
        dropped_by_source=drops.by_source(),
        hits_by_benchmark=dict(sorted(Counter(hit["benchmark"] for _, hit in hits.values()).items())),
        evaluation_questions=len(test.questions) + len(benchmarks.questions),
        **comparisons.summary(),
    )


def warn_of_hits(drops: Drops) -> None:
    """Log how many rows of each source are left out."""
    for source, reasons in drops.by_source().items():
        log.warning(
            "%s: %d row(s) of %s overlap with evaluation questions and are not trained on, such as %s",
            *(HITS, sum(reasons.values()), source, drops.examples[source][0]),
        )


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
