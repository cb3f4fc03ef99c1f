"""Run the stage: find duplicates; write survivors, removed rows and label conflicts."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nightshift.core.config import load_params
from nightshift.core.files import iterate_batches, iterate_rows, text_digest, write_batches, write_rows
from nightshift.core.memo import Memo
from nightshift.core.paths import CONFLICTS, DEDUPED, INGESTED, REMOVED
from nightshift.core.stage import run_main, write_summary
from nightshift.data.drops import Drops, require_drop_rate
from nightshift.data.schemas import CONNECTED, PROMPTS
from nightshift.data.text import canonical_messages
from tasks.dedupe import DedupeParams
from tasks.dedupe.candidates import Removal, Text, keep_first, own_shingles
from tasks.dedupe.prompts import list_prompts
from tasks.dedupe.reasons import HARMLESS, classify_removals
from tasks.dedupe.signatures import (
    Keys,
    open_memo,
    sign_cached,
    sign_passages,
    sign_texts,
    spell_shingles,
)
from tasks.dedupe.templates import Templates, find_shared_keys

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
    ids, texts, prompts, origins, contents = [], [], [], [], []
    for row in iterate_rows(INGESTED, ["id", "messages", "tools", "origin"]):
        turns = [canonical_messages([message]) for message in row["messages"]]
        ids.append(row["id"])
        texts.append(join_turns(turns))
        prompts.append(list_prompts(row["messages"], turns))
        origins.append(row["origin"])
        contents.append(text_digest(json.dumps(row["messages"]), row["tools"] or ""))
    with open_memo(params) as memo:
        removals = find_duplicates(texts, params, memo)
    shards = [sys.intern(origin.rpartition(":")[0]) for origin in origins]
    reasons = classify_removals(removals, contents, shards)
    write_rows(REMOVED, _removed_rows(ids, removals, reasons), REMOVED_SCHEMA)
    drops = count_drops(removals, reasons, origins)
    require_drop_rate(
        drops,
        params.max_drop_rate,
        (REMOVED, "dedupe.max_drop_rate"),
        "see the merged rows in this file, change them or dedupe.jaccard_threshold",
        harmless=HARMLESS,
    )
    sources: Counter[str] = Counter()
    write_batches(DEDUPED, survivors(texts, prompts, removals, sources), CONNECTED)
    conflicts = find_label_conflicts(texts, removals)
    write_rows(CONFLICTS, _conflict_rows(ids, texts, conflicts), CONFLICTS_SCHEMA)
    write_summary(
        "dedupe",
        rows_in=len(ids),
        rows_out=len(ids) - len(removals),
        dropped=drops.by_reason(),
        dropped_by_source=drops.by_source(),
        rows_out_by_source=dict(sorted(sources.items())),
        label_conflicts=len(conflicts),
        rows_in_label_conflicts=sum(len(members) for members in conflicts),
    )


def join_turns(turns: Sequence[str]) -> Text:
    """Join the canonical texts of the turns of a conversation, with the last answer separate.

    Example:
        >>> join_turns(["user who", "assistant me"])
        Text(prompt='user who', answer='assistant me')
    """
    return Text(" ".join(turns[:-1]), " ".join(turns[-1:]))


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
    roots = [first.setdefault(text.whole, i) for i, text in enumerate(texts)]
    unique = list(first.values())
    known = [texts[i] for i in unique]
    keys, templates = find_keys(known, params, memo)
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


def find_keys(texts: Sequence[Text], params: DedupeParams, memo: Memo) -> tuple[Keys, Templates]:
    """Find the keys by which texts are compared, and the templates of their prompts.

    A key that many chats share comes from their template. It is replaced by a number that no other text
    has, and such a chat has further keys, of what is its own.

    Returns:
        Keys, shape (n, bands) or (n, 2 * bands), uint64; and the templates.
    """
    keys = sign_cached([text.whole for text in texts], params, memo, sign_texts)
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
    further[crowd] = sign_cached(spelled, params, memo, sign_passages)
    return np.hstack([np.where(is_shared, numbers, keys), further]), templates


def survivors(
    texts: Sequence[Text],
    prompts: Sequence[list[str]],
    removals: Mapping[int, Removal],
    sources: Counter[str],
) -> Iterator[pa.RecordBatch]:
    """Yield the surviving examples with their group id and prompts; count them by source."""
    start = 0
    for batch in iterate_batches(INGESTED):
        kept = [i for i in range(start, start + batch.num_rows) if i not in removals]
        rows = batch.take(pa.array([i - start for i in kept], pa.int64()))
        start += batch.num_rows
        sources.update(rows["source"].to_pylist())
        groups = [text_digest(texts[i].whole) for i in kept]
        columns = [pa.array(groups, pa.string()), pa.array([prompts[i] for i in kept], PROMPTS)]
        yield pa.RecordBatch.from_arrays([*rows.columns, *columns], schema=CONNECTED)


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
    ids: Sequence[str], removals: Mapping[int, Removal], reasons: Mapping[int, str]
) -> Iterator[dict[str, Any]]:
    """Yield a report row for each removed example, with the example kept instead."""
    for i, reason in reasons.items():
        removal = removals[i]
        yield {
            "id": ids[i],
            "kept_id": ids[removal.kept],
            "jaccard": removal.jaccard,
            "reason": reason,
            "near_ids": [ids[other] for other in removal.near],
        }


def _conflict_rows(
    ids: Sequence[str], texts: Sequence[Text], conflicts: Sequence[Sequence[int]]
) -> Iterator[dict[str, str]]:
    """Yield a report row for each example that contradicts another."""
    for members in conflicts:
        for i in members:
            yield {"prompt_id": text_digest(texts[i].prompt), "id": ids[i], "answer": texts[i].answer}


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
