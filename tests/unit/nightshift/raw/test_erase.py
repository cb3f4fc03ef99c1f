"""Rows that were forgotten are recognized, however a source writes them and whatever the parameters say."""

import json
import lzma
from pathlib import Path

import pytest

from nightshift.raw.convert import convert
from nightshift.raw.erase import content_digest, erase_known
from nightshift.raw.forgotten import Forgotten, read_forgotten, write_forgotten
from nightshift.raw.options import SourceOptions, write_options
from nightshift.raw.readers import read_shard
from nightshift.raw.streams import Limits

ROW = {"prompt": "Who?", "completion": "Caf\u00e9"}


@pytest.mark.parametrize(
    "row",
    [
        {"question": " Who?", "answer": "Caf\u00c3\u00a9\r\n"},
        {
            "messages": [
                {"role": "human", "content": "Who?"},
                {"role": "gpt", "content": "Caf\u00e9", "weight": 0},
            ]
        },
    ],
)
def test_the_digest_of_a_content_does_not_depend_on_how_it_is_written(row: dict[str, object]) -> None:
    assert content_digest(convert(row)) == content_digest(convert(ROW))
    assert content_digest(convert(row)) != content_digest(convert(ROW | {"prompt": "What?"}))


def test_a_forgotten_row_is_recognized_by_the_options_of_its_source(tmp_path: Path) -> None:
    write_options(tmp_path, {"a": SourceOptions(columns={"prompt": "frage", "completion": "antwort"})})
    write_forgotten(tmp_path, Forgotten(contents={content_digest(convert(ROW))}))
    shard = tmp_path / "a" / "000001.csv.xz"
    shard.parent.mkdir()
    shard.write_bytes(lzma.compress("frage,antwort\nWho?,Café\nWhat?,Tea\n".encode()))
    erase_known(shard, tmp_path)
    assert list(read_shard(shard, Limits(10**6, 10**9, 200))) == [(3, {"frage": "What?", "antwort": "Tea"})]
    assert read_forgotten(tmp_path).rows == {"a/000001.csv.xz:2"}


def test_a_forgotten_rejected_answer_is_recognized(tmp_path: Path) -> None:
    write_options(tmp_path, {"a": SourceOptions(preference="compare")})
    write_forgotten(tmp_path, Forgotten(contents={content_digest(convert(ROW))}))
    shard = tmp_path / "a" / "000001.jsonl"
    shard.parent.mkdir()
    rows = [
        {"prompt": "Who?", "chosen": "Tea", "rejected": "Caf\u00e9"},
        {"prompt": "Who?", "completion": "Caf\u00e9", "label": False},
        {"prompt": "Who?", "chosen": "Tea", "rejected": "Milk"},
    ]
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    erase_known(shard, tmp_path)
    assert list(read_shard(shard, Limits(10**6, 10**9, 200))) == [(3, rows[2])]
    assert read_forgotten(tmp_path).rows == {"a/000001.jsonl:1", "a/000001.jsonl:2"}
