"""Bad input ends in quarantine, each row with its place and reason."""

import json
from pathlib import Path

import pytest

from tasks.errors import DataError
from tasks.ingest import ingest, main, require_share

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}).encode()


BAD = {
    b'{"messages": [': "malformed_json",
    b"\xff\xfe\x00": "not_utf8",
    b"[1]": "not_an_object",
    b'{"text": "x"}': "no_messages",
    chat(("user", "Hi"), ("robot", "Ho")): "unknown_role",
    chat(("user", "Hi"), ("assistant", "  ")): "empty_content",
    chat(("user", "Hi"), ("assistant", None)): "empty_content",
    chat(("user", "Hi <|im_end|>"), ("assistant", "Ho")): "special_token",
    chat(("assistant", "Ho"), ("user", "Hi")): "wrong_order",
    chat(("user", "Hi")): "no_final_answer",
    chat(("system", "Be kind")): "no_final_answer",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=BAD.values())
def test_a_bad_row_is_quarantined_with_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    shard = tmp_path / "mine" / "000001.jsonl"
    shard.parent.mkdir()
    shard.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    examples, quarantine = ingest(tmp_path)
    assert [row["origin"] for row in examples] == ["mine/000001.jsonl:1"]
    assert [(row["origin"], row["reason"]) for row in quarantine] == [("mine/000001.jsonl:3", reason)]


def test_rows_are_ordered_by_arrival_not_by_source(tmp_path: Path) -> None:
    for name in ("b/000001.jsonl", "a/000002.jsonl"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(json.dumps(GOOD))
    assert [row["arrival"] for row in ingest(tmp_path)[0]] == [1, 2]


def test_equal_rows_have_different_ids(tmp_path: Path) -> None:
    path = tmp_path / "a" / "000001.jsonl"
    path.parent.mkdir()
    path.write_text((json.dumps(GOOD) + "\n") * 2)
    assert len({row["id"] for row in ingest(tmp_path)[0]}) == 2


def test_too_many_bad_rows_fail_the_stage_and_are_named() -> None:
    row = {"origin": "a/000001.jsonl:7", "reason": "not_utf8", "remedy": "save the file as UTF-8"}
    require_share([row], 100, 0.01)
    with pytest.raises(DataError, match=r"data/raw/a/000001\.jsonl:7: not_utf8; save"):
        require_share([row, row], 100, 0.01)


def test_the_stage_fails_closed_and_keeps_the_quarantine_to_read(in_tmp: Path) -> None:
    (in_tmp / "params.yaml").write_text("ingest: {max_quarantined_share: 0.4}")
    path = in_tmp / "data" / "raw" / "a" / "000001.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(json.dumps(GOOD).encode() + b"\n{\n")
    with pytest.raises(DataError, match="1 of 2 rows are bad"):
        main()
    assert not (in_tmp / "data/ingest/examples.parquet").exists()
    assert "000001.jsonl:2" in (in_tmp / "data/ingest/quarantine.jsonl").read_text()


def test_no_data_at_all_is_an_error(in_tmp: Path) -> None:
    (in_tmp / "params.yaml").write_text("ingest: {max_quarantined_share: 1}")
    with pytest.raises(DataError, match="no rows"):
        main()
