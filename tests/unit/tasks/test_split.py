"""The split to which each example is assigned."""

from pathlib import Path

from nightshift.core.files import read_json, read_rows, write_rows
from nightshift.data.schemas import GROUPED
from tasks.dedupe.__main__ import REMOVED_SCHEMA
from tasks.split import SplitParams, main, split_of


def test_the_split_of_a_group_never_changes() -> None:
    params = SplitParams(validation_share=0.05, test_share=0.1, by_phrasing=[], seed=0)
    splits = {i: split_of(f"group-{i}", params) for i in (0, 8, 21, 32, 40)}
    assert splits == {0: "train", 8: "test", 21: "validation", 32: "test", 40: "validation"}


def test_a_source_by_phrasing_goes_entirely_to_train(in_tmp: Path) -> None:
    (in_tmp / "params.yaml").write_text(
        "split: {validation_share: 0.3, test_share: 0.5, by_phrasing: [facts], seed: 0}"
    )
    rows = [
        {
            "id": f"{source}{i}",
            "messages": [],
            "source": source,
            "origin": "x:1",
            "arrival": 1,
            "group_id": f"{source}{i}",
        }
        for source in ("facts", "chats")
        for i in range(20)
    ]
    write_rows(Path("data/dedupe/examples.parquet"), rows, GROUPED)
    write_rows(Path("data/dedupe/removed.parquet"), [], REMOVED_SCHEMA)
    main()
    train = read_rows(Path("data/split/train.parquet"))
    assert [row["source"] for row in train].count("facts") == 20
    summary = read_json(Path("data/split/summary.json"))
    assert summary["rows_in"] == summary["rows_out"] == 40
    assert sum(summary["rows_out_by_side"].values()) == 40


def test_a_removed_example_near_two_splits_is_listed_and_changes_neither(in_tmp: Path) -> None:
    (in_tmp / "params.yaml").write_text(
        "split: {validation_share: 0.05, test_share: 0.1, by_phrasing: [], seed: 0}"
    )
    rows = [
        {
            "id": f"id-{i}",
            "messages": [],
            "source": "s",
            "origin": "x:1",
            "arrival": 1,
            "group_id": f"group-{i}",
        }
        for i in (0, 8, 21)
    ]
    write_rows(Path("data/dedupe/examples.parquet"), rows, GROUPED)
    removed = [
        {
            "id": "bridge",
            "near_ids": ["id-0", "id-8"],
            "kept_id": "id-0",
            "jaccard": 0.9,
            "reason": "near_duplicate",
        },
        {
            "id": "twin",
            "near_ids": ["id-0"],
            "kept_id": "id-0",
            "jaccard": 1.0,
            "reason": "normalized_duplicate",
        },
    ]
    write_rows(Path("data/dedupe/removed.parquet"), removed, REMOVED_SCHEMA)
    main()
    assert read_rows(Path("data/split/bridges.parquet")) == [
        {"id": "bridge", "near_ids": ["id-0", "id-8"], "sides": ["train", "test"]}
    ]
    assert read_json(Path("data/split/summary.json"))["rows_out_by_side"] == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }
