"""Splits are recognized by the paths of files; no split is trained on by accident."""

import pytest

from nightshift.core.errors import DataError
from tasks.snapshot.sources.splits import choose_split, find_split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Train.CSV", "train"),
        ("my-train-set.jsonl", "train"),
        ("train_0001.jsonl", "train"),
        ("training/part-1.parquet", "train"),
        ("en/val.jsonl", "validation"),
        ("dev/a.jsonl", "validation"),
        ("valid.json", "validation"),
        ("eval.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("data/train-00000-of-00001-2f8c.parquet", "train"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("data/calibration-00000-of-00003.parquet", "calibration"),
        ("default/train_gen/0000.parquet", "train_gen"),
        ("default/validation/0000.parquet", "validation"),
        ("test/data-00000-of-00001.arrow", "test"),
        ("data-00000-of-00001.arrow", None),
        ("part-00000-of-00010.parquet", None),
        ("latest.jsonl", None),
        ("trains.jsonl", None),
        ("devices/a.jsonl", None),
        ("contest.csv", None),
        ("a.jsonl", None),
    ],
)
def test_the_path_of_a_file_names_its_split(name: str, split: str | None) -> None:
    assert find_split(name) == split


def test_a_split_is_chosen_by_any_of_its_names() -> None:
    names = ["dev.jsonl", "test.jsonl", "train-1.jsonl", "train-2.jsonl"]
    assert choose_split(names, "train", "x") == ["train-1.jsonl", "train-2.jsonl"]
    assert choose_split(names, "validation", "x") == choose_split(names, "dev", "x") == ["dev.jsonl"]
    assert choose_split(names, "all", "x") == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/train.jsonl", "a/test.jsonl"], "has the splits test, train; set `split: train` for this source"),
        (["chats.jsonl", "test.jsonl"], "has the splits test and other files; set `split: test` for"),
        (["dev.jsonl", "test.jsonl"], "has the splits test, validation; set `split: test` for"),
    ],
)
def test_several_splits_without_a_choice_are_an_error(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=f"^snapshot.sources: x {message}"):
        choose_split(names, None, "x")


def test_one_split_or_none_needs_no_choice() -> None:
    for names in (
        ["a.jsonl", "b.jsonl"],
        ["test.jsonl"],
        ["train/a.jsonl", "train/b.jsonl"],
        ["a.csv", "train.csv"],
    ):
        assert choose_split(names, None, "x") == names


def test_a_split_without_files_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"x has no file of the split 'tran'; choose one of test, train$"):
        choose_split(["train.jsonl", "test.jsonl"], "tran", "x")
    with pytest.raises(DataError, match="of the split 'train'; no path names a split, so remove `split`"):
        choose_split(["a.jsonl"], "train", "x")
