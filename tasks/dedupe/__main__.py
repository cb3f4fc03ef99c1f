"""Run the stage: find duplicates; write survivors, removed rows and label conflicts."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nightshift.core.config import load_params
from nightshift.core.files import data_size, iterate_batches, text_digest, write_batches, write_rows
from nightshift.core.memo import Memo
from nightshift.core.paths import CONFLICTS, DEDUPED, INGESTED, REMOVED
from nightshift.core.stage import run_main, write_summary
from nightshift.core.workers import start_workers
from nightshift.data.drops import Drops, require_drop_rate
from nightshift.data.schemas import CONNECTED, PROMPTS
from tasks.dedupe import DedupeParams
from tasks.dedupe.candidates import Removal, Text, keep_first, own_shingles
from tasks.dedupe.reasons import HARMLESS, classify_removals
from tasks.dedupe.rows import Row, start_reading
from tasks.dedupe.signatures import (
    Keys,
    open_memo,
    sign_cached,
    sign_passages,
    sign_texts,
    spell_shingles,
)
from tasks.dedupe.templates import Templates, find_shared_keys

# Size of the rows from which they are read on all CPU cores, and rows that a process reads at once.
MANY_BYTES = 64 * 2**20
ROWS_PER_WORK = 1000
# near_ids: all survivors above the threshold for the removed example, `kept_id` first.
REMOVED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kept_id", pa.string()),
        ("jaccard", pa.float64()),
        ("reason", pa.string()),
        ("near_ids", pa.list_(pa.string())),
    ]
)
# Examples with the same prompt_id have the same prompt and different answers.
CONFLICTS_SCHEMA = pa.schema([("prompt_id", pa.string()), ("id", pa.string()), ("answer", pa.string())])


def main() -> None:
    """Remove duplicates; assign every survivor the group id of its content."""
    params = load_params(DedupeParams, "dedupe")
    rows = read_rows()
    texts, origins = [row.text for row in rows], [row.origin for row in rows]
    with open_memo(params) as memo:
        removals = find_duplicates(texts, params, memo)
    shards = [sys.intern(origin.rpartition(":")[0]) for origin in origins]
    reasons = classify_removals(removals, [row.content for row in rows], shards)
    write_rows(REMOVED, _removed_rows(rows, removals, reasons), REMOVED_SCHEMA)
    drops = count_drops(removals, reasons, origins)
    require_drop_rate(
        drops,
        params.max_drop_rate,
        (REMOVED, "dedupe.max_drop_rate"),
        "see the merged rows in this file, change them or dedupe.jaccard_threshold",
        harmless=HARMLESS,
    )
    sources: Counter[str] = Counter()
    write_batches(DEDUPED, survivors(rows, removals, sources), CONNECTED)
    conflicts = find_label_conflicts(texts, removals)
    write_rows(CONFLICTS, _conflict_rows(rows, conflicts), CONFLICTS_SCHEMA)
    write_summary(
        "dedupe",
        rows_in=len(rows),
        rows_out=len(rows) - len(removals),
        dropped=drops.by_reason(),
        dropped_by_source=drops.by_source(),
        rows_out_by_source=dict(sorted(sources.items())),
        label_conflicts=len(conflicts),
        rows_in_label_conflicts=sum(len(members) for members in conflicts),
    )


def read_rows() -> list[Row]:
    """Read what is compared of all rows, on all CPU cores if there are many."""
    columns = ["id", "messages", "tools", "origin"]
    is_large = data_size(INGESTED) > MANY_BYTES
    with start_workers("dedupe", start_reading, is_large=is_large, batch=1) as read_all:
        return [row for rows in read_all(iterate_batches(INGESTED, columns, ROWS_PER_WORK)) for row in rows]


def find_duplicates(texts: Sequence[Text], params: DedupeParams, memo: Memo) -> dict[int, Removal]:
    """Find the texts that duplicate an earlier survivor.

    Args:
        texts: Texts in order of arrival, shape (n,).
        params: MinHash parameters.
        memo: Cache of known signatures.

    Returns:
        index -> removal, for every removed text. Of equal texts, the first stays. O(n log n) time plus
        the verification of candidates; deterministic.
    """
    first: dict[str, int] = {}
    roots = [first.setdefault(text_digest(text.whole, size=16), i) for i, text in enumerate(texts)]
    unique = list(first.values())
    known = [texts[i] for i in unique]
    keys, templates = find_keys(known, list(first), params, memo)
    near = keep_first(known, keys, params, templates)
    removals = {
        unique[i]: Removal(
            unique[one.kept], one.jaccard, one.reason, tuple(unique[other] for other in one.near)
        )
        for i, one in near.items()
    }
    for i, root in enumerate(roots):
        if i != root:
            # A copy of a removed text is removed for the same reason.
            removals[i] = removals.get(root) or Removal(root, 1.0, "normalized_duplicate", (root,))
    return removals


def find_keys(
    texts: Sequence[Text], digests: Sequence[str], params: DedupeParams, memo: Memo
) -> tuple[Keys, Templates]:
    """Find the keys by which texts are compared, and the templates of their prompts.

    A key that many chats share comes from their template. It is replaced by a number that no other text
    has, and such a chat has further keys, of what is its own.

    Args:
        texts: Texts, shape (n,).
        digests: Digests of the whole texts, shape (n,).
        params: MinHash parameters.
        memo: Cache of known signatures.

    Returns:
        Keys, shape (n, bands) or (n, 2 * bands), uint64; and the templates.
    """
    keys = sign_cached((text.whole for text in texts), digests, params, memo, sign_texts)
    is_shared = find_shared_keys(keys)
    is_shared[[not text.prompt for text in texts]] = False
    crowd = np.flatnonzero(is_shared.any(axis=1)).tolist()
    templates = Templates((texts[i].prompt for i in crowd), params.shingle_size)
    if not templates:
        return keys, templates
    own = (own_shingles(texts[i], params.shingle_size, templates) for i in crowd)
    spelled = [spell_shingles(prompt | answer) for prompt, answer in own]
    numbers = np.broadcast_to(np.arange(len(texts), dtype=np.uint64)[:, None], keys.shape)
    further = numbers.copy()
    of_passages = [text_digest("passages", text, size=16) for text in spelled]
    further[crowd] = sign_cached(spelled, of_passages, params, memo, sign_passages)
    return np.hstack([np.where(is_shared, numbers, keys), further]), templates


def survivors(
    rows: Sequence[Row], removals: Mapping[int, Removal], sources: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the surviving examples with their group id and prompts; count them by source."""
    start = 0
    for batch in iterate_batches(INGESTED):
        kept = [i for i in range(start, start + batch.num_rows) if i not in removals]
        examples = batch.take(pa.array([i - start for i in kept], pa.int64()))
        start += batch.num_rows
        sources.update(examples["source"].to_pylist())
        groups = pa.array([rows[i].group_id for i in kept], pa.string())
        prompts = pa.array([rows[i].prompts for i in kept], PROMPTS)
        yield pa.RecordBatch.from_arrays([*examples.columns, groups, prompts], schema=CONNECTED)


def find_label_conflicts(texts: Sequence[Text], removals: Mapping[int, Removal]) -> list[list[int]]:
    """List the survivors that answer the same prompt differently, grouped by prompt.

    Example:
        >>> find_label_conflicts([Text("who", "me"), Text("who", "you"), Text("when", "now")], {})
        [[0, 1]]
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        if text.prompt and i not in removals:
            by_prompt[text.prompt].append(i)
    return [members for members in by_prompt.values() if len(members) > 1]


def count_drops(removals: Mapping[int, Removal], reasons: Mapping[int, str], origins: Sequence[str]) -> Drops:
    """Count all and removed rows by source, the first part of the origin."""
    drops = Drops(Counter(origin.split("/", 1)[0] for origin in origins))
    for i, reason in reasons.items():
        twin = f"{reason} of {origins[removals[i].kept]}, Jaccard {removals[i].jaccard:.2f}"
        drops.add(origins[i].split("/", 1)[0], reason, f"{origins[i]}: {twin}")
    return drops


def _removed_rows(
    rows: Sequence[Row], removals: Mapping[int, Removal], reasons: Mapping[int, str]
) -> Iterator[dict[str, Any]]:
    """Yield a report row for each removed example, with the example kept instead."""
    for i, reason in reasons.items():
        removal = removals[i]
        yield {
            "id": rows[i].id,
            "kept_id": rows[removal.kept].id,
            "jaccard": removal.jaccard,
            "reason": reason,
            "near_ids": [rows[other].id for other in removal.near],
        }


def _conflict_rows(rows: Sequence[Row], conflicts: Sequence[Sequence[int]]) -> Iterator[dict[str, str]]:
    """Yield a report row for each example that contradicts another."""
    for members in conflicts:
        for i in members:
            text = rows[i].text
            yield {"prompt_id": text_digest(text.prompt), "id": rows[i].id, "answer": text.answer}


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
