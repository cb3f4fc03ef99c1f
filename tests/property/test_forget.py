"""Properties of forgetting: erased rows are gone from every format, all other rows are unchanged."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightshift.pipeline.dvc_cache import Run, affected
from nightshift.raw.erase import NO_LIMITS, erase_rows
from nightshift.raw.faults import RowError
from nightshift.raw.readers import read_shard
from nightshift.raw.streams import open_codec

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=8)
FORMATS = (
    *(".jsonl", ".ndjson.xz", ".json", ".csv", ".tsv.bz2", ".txt", ".txt.gz", ".jsonl.gz", ".csv.zst"),
    *(".json.zst", ".parquet", ".arrow", ".feather"),
)


def write(path: Path, texts: list[str], bom: bytes) -> None:
    """Write a shard with a malformed row and multi-line rows, where the format allows them."""
    if path.suffix in (".parquet", ".arrow", ".feather"):
        table = pa.table({"text": texts, "meta": [{"n": len(text)} for text in texts]})
        if path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=2)
            return
        create = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with create(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return
    if ".csv" in path.name or ".tsv" in path.name:
        comma = "," if ".csv" in path.name else "\t"
        fields = [("text", "note"), *(('"' + text.replace('"', '""') + '"', "\u00e9") for text in texts)]
        content = "\n".join([*(comma.join(row) for row in fields), comma.join("abc")]) + "\n"
    elif ".txt" in path.name:
        content = "\n \n\n".join(f"{text}|\nmore" for text in texts)
    elif ".jsonl" in path.name or ".ndjson" in path.name:
        content = "\n\n".join(json.dumps({"text": text}) for text in texts) + "\n{bad\n"
    else:
        content = "[" + " ,\n".join([*(json.dumps({"text": text}) for text in texts), '{"bad" 1}']) + "\n]"
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix)
    with open_codec(path, codec, write=True) as file:
        file.write(bom + content.encode())


def rows(path: Path) -> dict[int, Any]:
    """Return the rows of a shard by number; a bad row as its reason."""
    return {n: row.reason if isinstance(row, RowError) else row for n, row in read_shard(path, NO_LIMITS)}


@pytest.mark.parametrize("suffix", FORMATS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(texts=st.lists(WORDS, min_size=1, max_size=6, unique=True), data=st.data())
def test_other_rows_keep_their_numbers_and_content(
    tmp_path: Path, suffix: str, texts: list[str], data: st.DataObject
) -> None:
    path = tmp_path / f"000001{suffix}"
    write(path, texts, data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])))
    before = rows(path)
    numbers = data.draw(st.sets(st.sampled_from(sorted(before)), min_size=1))
    erase_rows(path, numbers)
    after = rows(path)
    assert {n: row for n, row in after.items() if n not in numbers} == {
        n: row for n, row in before.items() if n not in numbers
    }
    # An erased row keeps none of its content.
    nothing = ("not_an_object", {"text": None, "meta": None})
    assert all(after[n] in nothing for n in numbers & after.keys())


WRAPPED = st.sampled_from(
    ['{"data": [%s]}', '{"version": 1,\n "train": [%s], "note": {"data": []}}', "%s\n", " [%s] "]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(texts=st.lists(WORDS, min_size=1, max_size=4, unique=True), wrapped=WRAPPED, data=st.data())
def test_rows_are_erased_from_every_shape_of_a_json_file(
    tmp_path: Path, texts: list[str], wrapped: str, data: st.DataObject
) -> None:
    path = tmp_path / "000001.json"
    comma = "," if "[" in wrapped else "\n"
    path.write_text(wrapped % comma.join(json.dumps({"text": text}, indent=1) for text in texts))
    assert rows(path) == {number: {"text": text} for number, text in enumerate(texts, start=1)}
    numbers = data.draw(st.sets(st.sampled_from(range(1, len(texts) + 1)), min_size=1))
    erase_rows(path, numbers)
    expected = {
        number: "not_an_object" if number in numbers else {"text": text}
        for number, text in enumerate(texts, start=1)
    }
    assert rows(path) == expected


@given(
    runs=st.lists(
        st.builds(Run, st.frozensets(st.integers(0, 9).map(str)), st.frozensets(st.integers(0, 9).map(str)))
    ),
    start=st.sets(st.integers(0, 9).map(str)),
)
def test_the_affected_outputs_are_the_smallest_closed_set(runs: list[Run], start: set[str]) -> None:
    found = affected(runs, start)
    for run in runs:
        if run.deps & (found | start):
            assert run.outs <= found
    # Each affected path was written by a run that read a path affected before it.
    reached: set[str] = set()
    while True:
        grown = {o for run in runs if run.deps & (start | reached) for o in run.outs}
        if grown == reached:
            break
        reached = grown
    assert found == reached
