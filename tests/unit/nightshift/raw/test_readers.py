"""Every format yields rows one by one; a damaged file stops the stage, a single bad row does not."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.core.errors import DataError
from nightshift.raw.arrays import split_rows
from nightshift.raw.faults import RowError
from nightshift.raw.readers import read_shard
from nightshift.raw.streams import Limits, open_codec

LIMITS = Limits(row_bytes=1000, shard_bytes=10**9, ratio=200)


def read(path: Path, content: bytes, limits: Limits = LIMITS) -> list[tuple[int, Any]]:
    """Return the numbered rows of a shard; a bad row as its reason."""
    path.write_bytes(content)
    rows = read_shard(path, limits)
    return [(number, row.reason if isinstance(row, RowError) else row) for number, row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv.gz", "a.parquet"])
def test_an_empty_file_is_one_bad_row(tmp_path: Path, name: str) -> None:
    assert read(tmp_path / name, b"") == [(1, "empty_file")]


@pytest.mark.parametrize(("codec", "suffix"), [("gzip", "gz"), ("zstd", "zst"), ("bz2", "bz2"), ("xz", "xz")])
def test_compressed_lines_are_read_and_a_truncated_file_is_an_error(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(1000))
    with open_codec(tmp_path / "whole", codec, write=True) as file:
        file.write(lines)
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / f"a.jsonl.{suffix}"
    assert read(path, whole)[-1] == (1000, {"text": "999"})
    for damaged in (whole[:-9], b"x" * 100):
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: damaged or truncated"):
            read(path, damaged)


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


@pytest.mark.parametrize(("suffix", "compress"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_bombs_of_other_codecs_are_stopped(tmp_path: Path, suffix: str, compress: Any) -> None:
    bomb = compress(b" " * (80 * 2**20))
    with pytest.raises(DataError, match=r"expand to \d+ or more.*max_compression_ratio=200"):
        read(tmp_path / f"a.txt.{suffix}", bomb)
    with pytest.raises(DataError, match="max_shard_bytes=1000000"):
        read(tmp_path / f"a.json.{suffix}", bomb, Limits(row_bytes=1000, shard_bytes=10**6, ratio=10**6))


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


ONE, TWO = {"text": "a", "list": [{"b": "{"}]}, {"text": "c"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(ONE, indent=2), [ONE]),
        (json.dumps(ONE, indent=2) + "\n" + json.dumps(TWO, indent=2), [ONE, TWO]),
        (json.dumps(ONE, indent=2) + json.dumps(TWO), [ONE, TWO]),
        (json.dumps({"data": [ONE, TWO]}), [ONE, TWO]),
        (json.dumps({"version": {"data": [1]}, "train": [ONE, TWO], "n": 2}, indent=1), [ONE, TWO]),
        (json.dumps({"rows": [], "n": 2}), []),
        ('{"data": [1]}\n{"data": [2]}', [{"data": [1]}, {"data": [2]}]),
        (json.dumps({"messages": []}, indent=1), [{"messages": []}]),
        ('{"text": "a"\n{"text": "b"}', ["malformed_json", {"text": "b"}]),
        ("\n\n", []),
    ],
)
def test_a_json_file_may_have_every_shape(tmp_path: Path, content: str, expected: list[Any]) -> None:
    assert [row for _, row in read(tmp_path / "a.json", content.encode())] == expected


def test_a_row_of_a_document_may_be_too_large(tmp_path: Path) -> None:
    large = json.dumps({"text": "x" * 2000}, indent=1)
    expected = [(1, "too_large"), (2, TWO)]
    assert read(tmp_path / "a.json", (large + json.dumps(TWO)).encode()) == expected
    assert read(tmp_path / "a.json", f'{{"data": [{large}, {json.dumps(TWO)}]}}'.encode()) == expected


def test_several_lists_of_rows_in_one_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"several lists of rows \(data, train\); keep one list in a file"):
        read(tmp_path / "a.json", b'{"train": [], "data": []}')


def test_an_unclosed_list_of_rows_is_an_error(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", b'{"data": [{"text": "a"},\n') == [(1, "malformed_json")]


def test_a_key_that_occurs_twice_is_a_bad_row(tmp_path: Path) -> None:
    content = b'{"text": "a", "text": "b"}\n{"a": [{"b": 1, "b": 1}]}\n{"a": {"b": 1}, "b": 2}\n'
    assert read(tmp_path / "a.jsonl", content) == [
        (1, "duplicate_key"),
        (2, "duplicate_key"),
        (3, {"a": {"b": 1}, "b": 2}),
    ]


def test_numbers_that_are_none_are_no_fault_of_a_row(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "a.jsonl", b'{"text": "a", "p": [NaN, -Infinity, 1e999]}')
    assert str(found) == "(1, {'text': 'a', 'p': [nan, -inf, inf]})"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32"),
    ],
)
def test_other_unicode_encodings_are_named(tmp_path: Path, name: str, encoding: str, said: str) -> None:
    with pytest.raises(
        DataError, match=rf"{name}: the text is {said}; save the source file as UTF-8"
    ) as caught:
        read(tmp_path / name, 'text\n{"text": "a"}'.encode(encoding))
    assert "\n" not in str(caught.value)


def test_a_csv_header_in_another_encoding_or_with_other_separators_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the text is in another encoding; save the source file as UTF-8"):
        read(tmp_path / "a.csv", "Größe,text\n1,a\n".encode("latin-1"))
    for separator in (";", "\t", "|"):
        with pytest.raises(DataError, match=r"line 1: the columns are separated by "):
            read(tmp_path / "a.csv", f"prompt{separator}completion\na{separator}b\n".encode())
    with pytest.raises(DataError, match="line 1: the columns are separated by ','"):
        read(tmp_path / "a.tsv", b"prompt,completion\na,b\n")


def test_tab_separated_rows_are_read(tmp_path: Path) -> None:
    content = b'prompt\tcompletion\n"a\tb\nc"\td, e\nf\n'
    assert read(tmp_path / "a.tsv", content) == [
        (3, {"prompt": "a\tb\nc", "completion": "d, e"}),
        (4, "wrong_columns"),
    ]


def test_blank_lines_separate_the_documents_of_a_text_file(tmp_path: Path) -> None:
    content = b"\n  one\ntwo \n \t\n\r\nthree\r\n\n\xff\n\n%b\nb\n\nfour" % (b"x" * 2000)
    assert read(tmp_path / "a.txt", content) == [
        (2, {"text": "  one\ntwo "}),
        (6, {"text": "three"}),
        (8, "not_utf8"),
        (10, "too_large"),
        (13, {"text": "four"}),
    ]
    assert read(tmp_path / "a.txt", b"x" * 600 + b"\n" + b"y" * 600) == [(1, "too_large")]


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
    assert [json.loads(element or b"") for element in split_rows(file, "array", 1000)] == rows


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
