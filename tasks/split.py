"""Split survivors into train, validation and test by the hash of their group: data/dedupe -> data/split.

The split of a group depends only on the seed and on its content, so it never changes when data is
added, removed or reordered. Groups with the same value of a source's `group_by` column are one group, and
so are several answers to one prompt, and a conversation with its continuation.
Sources in `by_phrasing` go entirely to train: their facts must be learned, and their benchmark asks for
them in wordings that training never sees.
A comparison of answers goes where its example is; one with a bad answer only, where its prompt is.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from nightshift.core.config import StageParams, load_params
from nightshift.core.errors import DataError
from nightshift.core.files import appended_batches, iterate_batches, iterate_rows, write_rows
from nightshift.core.paths import BRIDGES, COMPARED, DEDUPED, PLACED, REMOVED, TEST, TRAIN, VALIDATION
from nightshift.core.stage import run_main, write_summary
from nightshift.data.components import connect
from nightshift.data.prompts import list_prompts
from nightshift.data.schemas import GROUPED, PLACED_PREFERENCES
from nightshift.data.text import canonical_messages

BRIDGES_SCHEMA = pa.schema(
    [("id", pa.string()), ("near_ids", pa.list_(pa.string())), ("sides", pa.list_(pa.string()))]
)
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
BUCKETS = 10_000
# Reasons for which deduplication removes an example whose content stays.
SAME_CONTENT = ("exact_duplicate", "normalized_duplicate")
log = logging.getLogger(__name__)


class SplitParams(StageParams):
    """Split shares and seed.

    Attributes:
        validation_share: Share of groups in the validation set, 0 to 1.
        test_share: Share of groups in the test set, 0 to 1.
        by_phrasing: Sources whose examples all go to train.
        seed: Seed of the hash; another seed gives another split.
    """

    validation_share: Annotated[float, Field(ge=0, lt=1)]
    test_share: Annotated[float, Field(gt=0, lt=1)]
    by_phrasing: list[str]
    seed: Annotated[int, Field(strict=True, ge=0)]

    @model_validator(mode="after")
    def _training_set_is_not_empty(self) -> "SplitParams":
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                "validation_share + test_share must be below 1, got "
                f"{self.validation_share} + {self.test_share}"
            )
        return self


def main() -> None:
    """Write one Parquet file per split, and the removed examples that bridge two splits."""
    params = load_params(SplitParams, "split")
    rows, keys = [], []
    for row in iterate_rows(DEDUPED, ["id", "source", "group_id", "group", "prompts"]):
        keys.append(row_keys(row))
        rows.append(row)
    alone = list(rows_without_example())
    components = connect([*keys, *map(row_keys, alone)])
    sides = assign([*rows, *alone], components, params)
    sides, sides_alone = sides[: len(rows)], sides[len(rows) :]
    components = components[: len(rows)]
    splits = {row["id"]: side for row, side in zip(rows, sides, strict=True)}
    counts = Counter(sides)
    require_splits(counts, len(set(components)))
    write_sides(sides)
    bridges = list(find_bridges(iterate_rows(REMOVED, ["id", "near_ids"]), splits))
    write_rows(BRIDGES, bridges, BRIDGES_SCHEMA)
    if bridges:
        log.info("%s: %d removed example(s) were near-duplicates across splits", BRIDGES, len(bridges))
    compared = Counter[str]()
    write_rows(PLACED, place_preferences(splits, sides_alone, compared), PLACED_PREFERENCES)
    more: dict[str, Any] = {"compared": dict(sorted(compared.items()))} if compared else {}
    write_summary(
        "split",
        rows_in=len(splits),
        rows_out=counts.total(),
        groups=len(set(components)),
        rows_out_by_side={name: counts[name] for name in SPLITS},
        bridges=len(bridges),
        **more,
    )


def rows_without_example() -> Iterator[dict[str, Any]]:
    """Yield what `assign` and `row_keys` need of each comparison with a bad answer only, in order."""
    for row in iterate_rows(COMPARED, ["example_id", "prompt", "rejected", "source", "group"]):
        if row["example_id"] is None:
            messages = [*row["prompt"], *row["rejected"]]
            prompts = list_prompts(messages, [canonical_messages([one]) for one in messages])
            yield {
                "source": row["source"],
                "group": row["group"],
                "group_id": prompts[-1],
                "prompts": prompts,
            }


def place_preferences(
    splits: Mapping[str, str], sides_alone: Iterable[str], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield each comparison once, with its side.

    That of a removed example stays if the content of the example does: the same good answer was compared with
    another bad one.

    Args:
        splits: Id of each example -> split.
        sides_alone: Split of each comparison with a bad answer only, in order.
        counts: Counts the comparisons by side, and those that are dropped by reason.
    """
    removed = iterate_rows(REMOVED, ["id", "kept_id", "reason"])
    kept = {row["id"]: row["kept_id"] for row in removed if row["reason"] in SAME_CONTENT}
    remaining, seen = iter(sides_alone), set[str]()
    for row in iterate_rows(COMPARED):
        if row["example_id"] is None:
            side = next(remaining)
        else:
            row["example_id"] = kept.get(row["example_id"], row["example_id"])
            side = splits.get(row["example_id"], "near_duplicate")
        if row["id"] in seen:
            side = "exact_duplicate"
        seen.add(row["id"])
        counts[side] += 1
        if side in SPLITS:
            yield {**row, "side": side}


def row_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the keys of a row: rows that have a key in common belong to one side.

    These are its content, the value of the `group_by` column, its prompt, which several answers may have,
    and the prompt of each earlier answer, by which a conversation and its continuation are connected.
    """
    keys = [f"content {row['group_id']}", *(f"prompt {prompt}" for prompt in row["prompts"])]
    return keys + ([f"column {row['group']}"] if row["group"] else [])


def assign(rows: Sequence[Mapping[str, Any]], components: Sequence[int], params: SplitParams) -> list[str]:
    """Return the split of each row, which is that of the earliest row of its component.

    A component with a row of a source in `by_phrasing` goes to train as a whole. The value of the `group_by`
    column decides if the earliest row has one, so that a component stays where it is when that row goes.

    Args:
        rows: Rows with source, group_id and group, in order of arrival.
        components: Number of the earliest row of each row's component, shape (n_rows,).
        params: Shares and seed.
    """
    train = {
        component
        for row, component in zip(rows, components, strict=True)
        if row["source"] in params.by_phrasing
    }
    sides = {
        component: split_of(rows[component]["group"] or rows[component]["group_id"], params)
        for component in set(components) - train
    }
    return [sides.get(component, "train") for component in components]


def require_splits(counts: Mapping[str, int], groups: int) -> None:
    """Fail if the training or test set is empty; sft checks the validation set if it needs one.

    Args:
        counts: Split -> number of examples.
        groups: Number of groups, which are never divided.

    Raises:
        DataError: The training or test set is empty.
    """
    total = sum(counts.values())
    for name, change in (("train", "lower"), ("test", "raise")):
        if not counts.get(name):
            raise DataError(
                f"{SPLITS[name]}: 0 of {total} examples, which form {groups} group(s); {change} "
                "split.test_share, add data, list fewer sources in split.by_phrasing, or choose a `group_by` "
                "with more values"
            )


def write_sides(sides: Sequence[str]) -> None:
    """Write each row of dedupe to the file of its split.

    Args:
        sides: Split of each row, shape (n_rows,).
    """
    with ExitStack() as stack:
        files = {name: stack.enter_context(appended_batches(path, GROUPED)) for name, path in SPLITS.items()}
        start = 0
        for batch in iterate_batches(DEDUPED, GROUPED.names):
            own = pa.array(sides[start : start + batch.num_rows])
            start += batch.num_rows
            for name, append in files.items():
                append(batch.filter(pc.equal(own, name)))


def find_bridges(removed: Iterable[dict[str, Any]], splits: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the removed examples that are near survivors in different splits.

    Such an example would leak held-out content into another split. Deduplication dropped it, because it
    is near a survivor that came first; the survivors keep their splits.

    Example:
        >>> list(find_bridges([{"id": "c", "near_ids": ["a", "b"]}], {"a": "train", "b": "test"}))
        [{'id': 'c', 'near_ids': ['a', 'b'], 'sides': ['train', 'test']}]
    """
    for row in removed:
        found = [splits[near] for near in row["near_ids"]]
        if len(set(found)) > 1:
            yield {**row, "sides": found}


def split_of(group_id: str, params: SplitParams) -> str:
    """Return the split of a group; a pure function of the seed and the group id."""
    digest = hashlib.blake2b(f"{params.seed}|{group_id}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % BUCKETS / BUCKETS
    if bucket < params.test_share:
        return "test"
    return "validation" if bucket < params.test_share + params.validation_share else "train"


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
