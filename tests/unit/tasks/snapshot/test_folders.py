"""Local locations: files, folders, globs and data sets that `datasets` saved."""

import logging
import os
import re
import time
from pathlib import Path

import pytest

from nightshift.core.errors import DataError
from nightshift.raw import formats
from tasks.snapshot.__main__ import copy_benchmark, resolve
from tasks.snapshot.sources.folders import file_version, local_offers


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(location: str | Path, split: str | None = None) -> dict[str, str]:
    """Return name -> content of the offered files."""
    offers = local_offers(str(location), split)
    return {offer.name: b"".join(offer.chunks).decode() for offer in offers}


def test_of_a_folder_all_readable_files_are_read_and_one_warning_names_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        tmp_path, "b.jsonl", "a/z.CSV.gz", "a/b/c.parquet", "README.md", "a/run.sh", ".git/x.jsonl", ".y.json"
    )
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(".")
    for location in (tmp_path, f"{tmp_path}/"):
        caplog.clear()
        names = ["a/b/c.parquet", "a/z.CSV.gz", "b.jsonl"]
        assert list(found(location).items()) == [(name, name) for name in names]
        (warning,) = caplog.records
        assert warning.levelno == logging.WARNING
        ignored = ", ".join(f"{tmp_path}/{name}" for name in ("README.md", "a/run.sh", "gone.jsonl", "loop"))
        assert warning.getMessage().endswith(f"4 file(s) are not data and are ignored: {ignored}")


def test_a_folder_without_readable_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "notes/README.md")
    for location in (tmp_path, f"{tmp_path}/no*"):
        with pytest.raises(DataError, match=r"contains no file that ingest can read; use \.jsonl") as caught:
            found(location)
        assert str(caught.value).startswith(f"snapshot.sources: {location} ")


@pytest.mark.parametrize("name", ["a[1].jsonl", "what?.jsonl", "[x]/*.jsonl", "ünï cødé.jsonl", "-x.jsonl"])
def test_a_path_that_exists_is_that_file_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, "a1.jsonl", "whatx.jsonl", "x/b.jsonl")
    assert list(found(tmp_path / name).values()) == [name]


def test_a_glob_matches_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "day-1/a.jsonl", "day-1/deep/b.json", "day-2.jsonl", "other/c.jsonl", "day-3/x.md")
    assert list(found(f"{tmp_path}/day-*")) == ["day-1/a.jsonl", "day-1/deep/b.json", "day-2.jsonl"]
    assert list(found(f"{tmp_path}/**")) == [
        *("day-1/a.jsonl", "day-1/deep/b.json", "day-2.jsonl", "other/c.jsonl")
    ]
    # Names start below the fixed part of the location.
    assert list(found(f"{tmp_path}/day-1/*.jsonl")) == ["a.jsonl"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "data/a.jsonl", "bench/task.yaml")
    assert (
        list(found("~/data")) == list(found("~/data/*.jsonl")) == list(found("~/data/a.jsonl")) == ["a.jsonl"]
    )
    with pytest.raises(DataError, match=r"snapshot\.sources: ~nobody1/x: no such user; write the whole path"):
        found("~nobody1/x")
    copy_benchmark(resolve("~/bench")[0], tmp_path / "copied", "here")
    assert (tmp_path / "copied/task.yaml").is_file()


@pytest.mark.parametrize("location", ["none.jsonl", "a" * 5000, "a\0b", "x/" * 3000])
def test_a_path_that_does_not_exist_or_cannot_exist_is_one_line(location: str) -> None:
    with pytest.raises(DataError, match="matches no file; correct the path or glob") as caught:
        found(location)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).touch()
    assert list(found(tmp_path)) == [r"caf\xe9.jsonl"]


def test_a_saved_data_set_is_read_without_its_descriptions_and_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, DatasetDict

    # The suffix that `save_to_disk` uses.
    suffix = re.compile(formats.SUFFIX.pattern.replace("parquet", "parquet|arrow"))
    monkeypatch.setattr(formats, "SUFFIX", suffix)
    both = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    both["train"].save_to_disk(tmp_path / "one")
    DatasetDict(both).save_to_disk(tmp_path / "both")
    write(tmp_path, "one/cache-0a1b.arrow")
    names = [offer.name for offer in local_offers(f"{tmp_path}/one")]
    assert names == ["data-00000-of-00001.arrow"]
    names = [offer.name for offer in local_offers(f"{tmp_path}/both", "train")]
    assert names == ["train/data-00000-of-00001.arrow"]
    with pytest.raises(DataError, match="has the splits test, train; set `split: train`"):
        list(local_offers(f"{tmp_path}/both"))


def test_a_clone_of_a_hub_data_set_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path, "README.md", ".gitattributes", "dataset_infos.json", "load.py")
    write(tmp_path, *(f"data/{split}-00000-of-00001.parquet" for split in ("train", "test", "validation")))
    assert list(found(tmp_path, "train")) == ["data/train-00000-of-00001.parquet"]
    assert len(found(tmp_path, "all")) == 3
    with pytest.raises(
        DataError, match=r"has the splits test, train, validation; set `split: train` for this"
    ):
        found(tmp_path)


def test_a_state_json_of_the_user_is_data(tmp_path: Path) -> None:
    write(tmp_path, "state.json")
    assert list(found(tmp_path)) == ["state.json"]


def test_the_version_of_a_file_changes_with_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jsonl")
    path = tmp_path / "a.jsonl"
    # Just written: the next change could leave the same time stamp.
    assert file_version(path) is None
    now = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now)
    before = file_version(path)
    assert before is not None
    assert before == file_version(path)
    stat = path.stat()
    path.write_text("b.jsonl")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # The same size and modification time.
    assert file_version(path) != before
