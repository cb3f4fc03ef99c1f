"""Every format yields rows one by one; a damaged file stops the stage, a single bad row does not."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.core.errors import DataError
from nightshift.raw.arrays import split_array
from nightshift.raw.faults import RowError
from nightshift.raw.readers import read_shard
from nightshift.raw.streams import Limits

LIMITS = Limits(row_bytes=1000, shard_bytes=10**9, ratio=200)


def read(path: Path, content: bytes, limits: Limits = LIMITS) -> list[tuple[int, Any]]:
    """Return the numbered rows of a shard; a bad row as its reason."""
    path.write_bytes(content)
    rows = read_shard(path, limits)
    return [(number, row.reason if isinstance(row, RowError) else row) for number, row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv.gz", "a.parquet"])
def test_an_empty_file_is_one_bad_row(tmp_path: Path, name: str) -> None:
    assert read(tmp_path / name, b"") == [(1, "empty_file")]


@pytest.mark.parametrize(("codec", "suffix"), [("gzip", "gz"), ("zstd", "zst")])
def test_compressed_lines_are_read_and_a_truncated_file_is_an_error(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(1000))
    with pa.output_stream(tmp_path / "whole", compression=codec) as file:
        file.write(lines)
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / f"a.jsonl.{suffix}"
    assert read(path, whole)[-1] == (1000, {"text": "999"})
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: damaged or truncated"):
        read(path, whole[:-9])


def test_a_gzip_file_with_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n')
    with pytest.raises(DataError, match="incorrect data check"):
        read(tmp_path / "a.jsonl.gz", whole[:-8] + bytes(8))


def test_a_decompression_bomb_is_stopped_by_ratio_and_by_size(tmp_path: Path) -> None:
    # 80 MiB of spaces compressed to 80 kB.
    bomb = gzip.compress(b" " * (80 * 2**20))
    with pytest.raises(DataError, match=r"expand to \d+ or more.*max_compression_ratio=200"):
        read(tmp_path / "a.jsonl.gz", bomb)
    with pytest.raises(DataError, match="max_shard_bytes=1000000"):
        read(tmp_path / "a.jsonl.gz", bomb, Limits(row_bytes=1000, shard_bytes=10**6, ratio=10**6))
    assert read(tmp_path / "a.jsonl.gz", bomb, Limits(10**8, 10**9, 10**4)) == []


def test_a_huge_line_is_one_bad_row_and_the_next_is_read(tmp_path: Path) -> None:
    content = b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "a"}\n' + b"y" * 1001
    found = [(1, "too_large"), (2, {"text": "a"}), (3, "too_large")]
    assert read(tmp_path / "a.jsonl", content) == found


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    line = b'{"text": "' + b"x" * 988 + b'"}'
    assert len(line) == 1000
    assert read(tmp_path / "a.jsonl", line + b"\n") == [(1, {"text": "x" * 988})]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}') == [(1, {"text": "a"})]
    assert read(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "a"}]') == [(1, {"text": "a"})]
    assert read(tmp_path / "a.csv", b"\xef\xbb\xbftext\na\n") == [(2, {"text": "a"})]


def test_a_json_file_may_contain_json_lines(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", b'{"text": "a"}\n{"text": "b"}\n') == [
        (1, {"text": "a"}),
        (2, {"text": "b"}),
    ]


def test_bad_array_elements_do_not_affect_others(tmp_path: Path) -> None:
    content = b'[{"text": "a]}\\"["}, {"text": nul}, "b", {"text": "%b"}, {"text": "\xff"}, {"text": "c"}]'
    assert read(tmp_path / "a.json", content % (b"x" * 2000)) == [
        (1, {"text": 'a]}"['}),
        (2, "malformed_json"),
        (3, "not_an_object"),
        (4, "too_large"),
        (5, "not_utf8"),
        (6, {"text": "c"}),
    ]


@pytest.mark.parametrize("content", [b"[", b'[{"text": "a"}', b'[{"text": "a"}] {}', b'[{"text": "a]'])
def test_a_malformed_array_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="damaged or truncated: "):
        read(tmp_path / "a.json", content)


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", b" [ ] \n") == []


class OneByteAtATime(io.BufferedReader):
    """A stream whose chunks end at every possible position."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(1)


def test_chunks_may_end_anywhere() -> None:
    rows = [{"a": '\\"', "b": ["\\", {"c": "[,]"}]}, {"a": "é€😀"}]
    file = OneByteAtATime(io.BytesIO(json.dumps(rows, ensure_ascii=False).encode()))
    assert [json.loads(element or b"") for element in split_array(file, 1000)] == rows


def test_bad_csv_rows_are_numbered_by_their_last_line(tmp_path: Path) -> None:
    content = b'prompt,completion\n"two\nlines",b\nonly one\n\n\xff,b\n"a" b,c\n%b,b\n"a ""quote""",b\n'
    assert read(tmp_path / "a.csv", content % (b"x" * 2000)) == [
        (3, {"prompt": "two\nlines", "completion": "b"}),
        (4, "wrong_columns"),
        (6, "not_utf8"),
        (7, "malformed_csv"),
        (8, "too_large"),
        (9, {"prompt": 'a "quote"', "completion": "b"}),
    ]


def test_an_unclosed_quote_and_a_duplicate_column_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 3: unexpected end of data"):
        read(tmp_path / "a.csv", b'text\n"a\nb\n')
    with pytest.raises(DataError, match="the header has no column names or a duplicate"):
        read(tmp_path / "a.csv", b"text,text\na,b\n")


def test_bad_parquet_rows_do_not_affect_others(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"x" * 2000, None], pa.binary()).view(pa.binary())
    # A cast without UTF-8 validation, as other writers do it.
    table = pa.table({"text": texts.view(pa.string())})
    pq.write_table(table, tmp_path / "b")
    found = read(tmp_path / "a.parquet", (tmp_path / "b").read_bytes())
    assert found == [(1, {"text": "a"}), (2, "not_utf8"), (3, "too_large"), (4, {"text": None})]


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet: damaged or truncated"):
        read(tmp_path / "a.parquet", b"PAR1 no more")


def test_parquet_with_a_declared_size_above_the_limit_is_not_read(tmp_path: Path) -> None:
    rows = pa.array([f"{i:0100d}" for i in range(1000)])
    pq.write_table(pa.table({"text": rows}), tmp_path / "b", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="max_shard_bytes=50000"):
        read(tmp_path / "a.parquet", (tmp_path / "b").read_bytes(), Limits(1000, 50_000, 200))
