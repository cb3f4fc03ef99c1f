"""Each row becomes an example or is quarantined with its origin and reason."""

import datetime
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nightshift.core.errors import DataError
from nightshift.core.state import state_dir
from nightshift.data.drops import Drops
from nightshift.data.encode import IGNORED, Fault, count_supervised, load_encoder
from nightshift.data.tokens import encode_known, open_memo
from nightshift.raw.options import SourceOptions, write_options
from nightshift.raw.shards import find_shards
from tasks.ingest import __main__ as stage
from tasks.ingest.__main__ import main, require_rows
from tests.helpers.byte_base import make_byte_base

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PARAMS = {
    "max_drop_rate": 1.0,
    "max_row_bytes": 1000,
    "max_shard_bytes": 10**9,
    "max_compression_ratio": 200,
    "max_tokens": None,
    "fix_encoding": False,
    "pii": "report",
    "pii_model": None,
}
Run = Callable[..., dict[str, Any]]


def chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}).encode()


@pytest.fixture
def run(in_tmp: Path) -> Run:
    """Return a function that runs the stage on shards (name -> bytes) and returns its outputs."""
    make_byte_base(in_tmp / "data/base/model")

    def run_stage(shards: dict[str, bytes], **params: Any) -> dict[str, Any]:
        (in_tmp / "params.yaml").write_text(yaml.safe_dump({"ingest": PARAMS | params}))
        for name, content in shards.items():
            path = in_tmp / "data/raw" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        main()
        out = in_tmp / "data/ingest"
        return {
            "examples": pq.read_table(out / "examples.parquet").to_pylist(),
            "compared": pq.read_table(out / "preferences.parquet").to_pylist(),
            "quarantine": [json.loads(line) for line in (out / "quarantine.jsonl").open()],
            "pii": [json.loads(line) for line in (out / "pii.jsonl").open()],
            "summary": json.loads((out / "summary.json").read_text()),
        }

    return run_stage


BAD = {
    b'{"messages": [': "malformed_json",
    b'{"text": NaN}': "not_text",
    b'{"text": "a", "text": "b"}': "duplicate_key",
    b"\xff\xfe\x00": "not_utf8",
    b"[1]": "not_an_object",
    b'{"question": "x"}': "no_answer",
    b'{"frage": "x"}': "unknown_format",
    b'{"messages": 1}': "no_messages",
    b'{"text": 1}': "not_text",
    rb'{"text": "\ud800"}': "lone_surrogate",
    b'{"text": ' + b"[" * 400 + b"1" + b"]" * 400 + b"}": "not_text",
    b'{"text": "' + b"x" * 1000 + b'"}': "too_large",
    chat(("user", "Hi"), ("robot", "Ho")): "unknown_role",
    chat(("user", "Hi"), ("assistant", "  ")): "empty_content",
    chat(("user", "Hi"), ("assistant", None)): "empty_content",
    chat(("user", "Hi <|im_end|>"), ("assistant", "Ho")): "special_token",
    chat(("user", "Hi [/INST] Ho"), ("assistant", "Ho")): "special_token",
    chat(("user", "the <filename> of it"), ("assistant", "Ho")): "special_token",
    chat(("user", "Hi\0"), ("assistant", "Ho")): "control_character",
    chat(("user", "a \u202e b"), ("assistant", "Ho")): "control_character",
    chat(("user", "a \ufffd b"), ("assistant", "Ho")): "control_character",
    chat(("assistant", "Ho"), ("user", "Hi")): "no_final_answer",
    chat(("tool", "3"), ("assistant", "Ho")): "wrong_order",
    chat(("system", " ")): "no_final_answer",
    chat(("user", "Hi")): "no_final_answer",
    chat(("system", "Be kind")): "no_final_answer",
    chat(("user", "Hi"), ("assistant", "Ho"), ("tool", "3"), ("assistant", "3")): "unpaired_tool_answer",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_row_is_quarantined_with_file_line_and_reason(run: Run, line: bytes, reason: str) -> None:
    found = run({"mine/000001.jsonl": json.dumps(GOOD).encode() + b"\n\n" + line + b"\n"})
    assert [row["origin"] for row in found["examples"]] == ["mine/000001.jsonl:1"]
    assert [(r["origin"], r["reason"]) for r in found["quarantine"]] == [("mine/000001.jsonl:3", reason)]
    assert found["quarantine"][0]["remedy"]
    assert found["summary"]["dropped"] == {reason: 1}


def test_json_that_is_nested_too_deeply_is_quarantined(run: Run) -> None:
    line = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    found = run({"mine/000001.jsonl": line}, max_row_bytes=10**6)
    assert [row["reason"] for row in found["quarantine"]] == ["too_deep"]


def test_the_quarantine_contains_the_keys_but_no_text_of_the_row(run: Run) -> None:
    found = run({"mine/000001.jsonl": b'{"frage": "geheim", "ada@example.org": "geheim"}'})
    assert found["quarantine"][0]["remedy"].endswith("keys seen ([EMAIL], frage)")
    assert "geheim" not in json.dumps(found["quarantine"])


def options(**sources: Any) -> bytes:
    """Return data/raw/options.json."""
    return json.dumps(sources).encode()


def test_several_processes_give_the_same_result_as_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("user", "Mail ada@example.org")
    lines = [*BAD, *(chat(asked, ("assistant", f"Done {i}")) for i in range(9))]
    shards = {"a/000001.jsonl": b"\n".join(lines), "b/000002.csv": b"prompt,completion\nHi,Ho\nHi,\n"}
    (Path("data/raw")).mkdir(parents=True)
    write_options(Path("data/raw"), {"b": SourceOptions(mode="replace", group_by="prompt")})
    alone = run(shards)
    monkeypatch.setattr(stage, "MANY_BYTES", 1)
    monkeypatch.setattr(stage, "ROWS_PER_WORK", 4)
    shutil.rmtree(state_dir() / "memo")
    assert run({}) == alone
    # The workers read the cache that they filled.
    assert run({}) == alone
    assert len(alone["examples"]) == 10
    assert alone["examples"][-1]["group"]


def test_only_trained_turns_have_labels(run: Run, in_tmp: Path) -> None:
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "three", "weight": 0},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "four", "weight": 1},
    ]
    (example,) = run({"a/000001.jsonl": json.dumps({"messages": turns}).encode()})["examples"]
    assert [turn["train"] for turn in example["messages"]] == [None, False, None, None]
    encoder = load_encoder(in_tmp / "data/base/model")
    with open_memo(encoder) as memo:
        same = [{**turn, "train": None} for turn in example["messages"]]
        sequences = encode_known([(example["messages"], None), (same, None)], encoder, memo)
    found, all_trained = [one for ones in sequences if not isinstance(ones, Fault) for one in ones]
    assert found.input_ids.tolist() == all_trained.input_ids.tolist()
    stop = encoder.tokenizer.token_to_id("<|im_end|>")
    trained = [token for token in found.labels.tolist() if token != IGNORED]
    assert (encoder.tokenizer.decode(trained), trained[-1]) == ("four", stop)
    assert count_supervised(all_trained.labels) == len("three") + 1 + len("four") + 1


def test_columns_that_are_not_read_are_counted_and_warned_of_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    row = GOOD | {"id": 1, "hint": "x", "empty": ""}
    other = {"messages": [turn | {"logprobs": [1]} for turn in GOOD["messages"]]}
    shards = {
        "a/000001.jsonl": b"\n".join(json.dumps(one).encode() for one in (row, row, other)),
        "a/000002.jsonl": json.dumps(row).encode(),
        "b/000003.jsonl": json.dumps(GOOD | {"source": "web"}).encode(),
    }
    found = run(shards)
    assert found["summary"]["ignored_columns"] == {
        "a": {"hint": 3, "id": 3, "messages.logprobs": 1},
        "b": {"source": 1},
    }
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["a: columns that are not read: hint (3 rows), messages.logprobs (1 rows)"]


def test_rows_with_a_key_of_their_own_do_not_fill_the_summary(run: Run) -> None:
    rows = [json.dumps(GOOD | {f"key{number}": 1}).encode() for number in range(150)]
    counts = run({"a/000001.jsonl": b"\n".join(rows)})["summary"]["ignored_columns"]["a"]
    assert (len(counts), counts["(other columns)"]) == (101, 50)


def test_the_options_of_a_source_map_its_columns_and_speakers(run: Run) -> None:
    shards = {
        "a/000001.csv": b"frage,antwort\nHi,Ho\n",
        "b/000002.jsonl": chat(("Kunde", "Hi"), ("Berater", "Ho")),
        "options.json": options(
            a={"columns": {"question": "frage", "answer": "antwort"}},
            b={"roles": {"Kunde": "user", "Berater": "assistant"}},
        ),
    }
    for example in run(shards)["examples"]:
        assert [(turn["role"], turn["content"]) for turn in example["messages"]] == [
            ("user", "Hi"),
            ("assistant", "Ho"),
        ]


def test_a_mapped_column_that_no_row_has_is_an_error(run: Run) -> None:
    shards = {
        "a/000001.csv": b"question,reply\nHi,Ho\n",
        "b/000002.jsonl": json.dumps(GOOD).encode(),
        "options.json": options(a={"columns": {"question": "question", "answer": "best"}}),
    }
    message = r"a: no row has the columns best; correct `columns`.*; columns seen: question, reply"
    with pytest.raises(DataError, match=message):
        run(shards)


def test_a_mapped_column_may_be_missing_in_some_rows(run: Run) -> None:
    rows = b'{"q": "Hi", "a": "Ho", "more": "!"}\n{"q": "Hi", "a": "Ho"}\n'
    columns = {"question": "q", "answer": "a", "context": "more"}
    found = run({"a/000001.jsonl": rows, "options.json": options(a={"columns": columns})})
    assert [row["messages"][0]["content"] for row in found["examples"]] == ["Hi\n\n!", "Hi"]


def test_rejected_answers_are_counted_but_are_no_bad_rows(run: Run) -> None:
    rows = [json.dumps(GOOD | {"label": number % 2 == 0}).encode() for number in range(40)]
    shards = {"a/000001.jsonl": b"\n".join(rows), "options.json": options(a={"preference": "chosen"})}
    found = run(shards, max_drop_rate=0.05)
    assert (found["summary"]["rows_out"], found["summary"]["dropped"]) == (20, {"rejected_answer": 20})


@pytest.mark.parametrize(
    "bad", [b'{"frage": "Hi", "antwort": "Ho"}', b'{"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}']
)
def test_one_bad_source_of_several_fails_the_stage(run: Run, bad: bytes) -> None:
    shards = {
        "good/000001.jsonl": b"\n".join([json.dumps(GOOD).encode()] * 1000),
        "bad/000002.jsonl": b"\n".join([bad] * 20),
    }
    with pytest.raises(DataError, match=r"20 of 20 rows of bad are dropped") as caught:
        run(shards, max_drop_rate=0.05)
    assert "good" not in str(caught.value)


def test_rows_of_all_formats_are_in_order_of_arrival(run: Run) -> None:
    shards = {
        "b/000001.jsonl": json.dumps(GOOD).encode(),
        "a/000010.csv": b"prompt,completion\nHi,Ho\n",
        "a/000002.json": b'[{"text": "One"}, {"text": "Two"}]',
    }
    found = run(shards)
    assert [row["origin"] for row in found["examples"]] == [
        "b/000001.jsonl:1",
        "a/000002.json:1",
        "a/000002.json:2",
        "a/000010.csv:2",
    ]
    assert [row["arrival"] for row in found["examples"]] == [1, 2, 2, 10]


def test_equal_rows_have_different_ids_and_a_second_run_gives_the_same_bytes(run: Run, in_tmp: Path) -> None:
    shards = {"a/000001.jsonl": (json.dumps(GOOD) + "\n").encode() * 2}
    assert len({row["id"] for row in run(shards)["examples"]}) == 2
    files = sorted((in_tmp / "data/ingest").iterdir())
    before = [path.read_bytes() for path in files]
    run(shards)
    assert [path.read_bytes() for path in files] == before


def test_a_tool_call_is_stored_as_json_with_sorted_keys_and_its_result_has_a_name(run: Run) -> None:
    function = {"name": "add", "arguments": '{"b": 2, "a": 1}'}
    row = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": function}]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "3."},
        ],
    }
    (example,) = run({"a/000001.jsonl": json.dumps(row).encode()})["examples"]
    assert example["tools"] == '[{"function": {"name": "add"}, "type": "function"}]'
    assert example["messages"][1:3] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning": None,
            "tool_calls": '[{"arguments": {"a": 1, "b": 2}, "name": "add"}]',
            "name": None,
            "train": None,
        },
        {
            "role": "tool",
            "content": "3",
            "reasoning": None,
            "tool_calls": None,
            "name": "add",
            "train": None,
        },
    ]


def test_repaired_rows_are_counted(run: Run, in_tmp: Path) -> None:
    rows = (
        chat(("user", "Caf\u00c3\u00a9?\r\nYes?"), ("assistant", "Ja"))
        + b"\n"
        + chat(("user", "Café?"), ("assistant", "Ja"))
    )
    found = run({"a/000001.jsonl": rows}, fix_encoding=True)
    assert [row["messages"][0]["content"] for row in found["examples"]] == ["Café?\nYes?", "Café?"]
    assert found["summary"]["repaired"] == {"line_ends": 1, "mojibake": 1}
    assert [json.loads(line) for line in (in_tmp / "data/ingest/repairs.jsonl").open()] == [
        {
            "repair": "line_ends",
            "origin": "a/000001.jsonl:1",
            "before": "Caf\u00c3\u00a9?\r\nYes?",
            "after": "Caf\u00c3\u00a9?\nYes?",
        },
        {
            "repair": "mojibake",
            "origin": "a/000001.jsonl:1",
            "before": "Caf\u00c3\u00a9?\nYes?",
            "after": "Café?\nYes?",
        },
    ]


def test_text_is_not_changed_by_default(run: Run) -> None:
    texts = ["Caf\u00c3\u00a9 is UTF-8 read as Latin-1", "  return 1\n", " blue. "]
    rows = [chat(("user", text), ("assistant", text)) for text in texts]
    found = run({"a/000001.jsonl": b"\n".join(rows)})
    assert [row["messages"][0]["content"] for row in found["examples"]] == texts
    assert [row["messages"][1]["content"] for row in found["examples"]] == texts
    assert found["summary"]["repaired"] == {}


def test_examples_of_repairs_are_few_short_and_without_personal_data(run: Run, in_tmp: Path) -> None:
    long = "x" * 500 + "\r\n" + "y" * 500
    rows = [chat(("user", "ada@example.org\r\nHi"), ("assistant", "Ho"))]
    rows += [chat(("user", long), ("assistant", "Ho"))] * 4
    found = run({"a/000001.jsonl": b"\n".join(rows)}, max_row_bytes=5000)
    assert found["summary"]["repaired"] == {"line_ends": 5}
    examples = [json.loads(line) for line in (in_tmp / "data/ingest/repairs.jsonl").open()]
    assert [one["origin"] for one in examples] == [f"a/000001.jsonl:{number}" for number in (2, 3, 4)]
    assert examples[0]["before"] == "…" + "x" * 20 + "\r\n" + "y" * 57
    assert len(examples[0]["after"]) == 80
    run({}, pii="redact", max_row_bytes=5000)
    assert (in_tmp / "data/ingest/repairs.jsonl").read_text() == ""


def test_tokens_are_counted_and_longer_examples_are_quarantined(run: Run) -> None:
    # One token per byte: 5 bytes and the stop token.
    found = run({"a/000001.jsonl": b'{"text": "12345"}\n{"text": "123456789"}\n'}, max_tokens=6)
    assert found["summary"]["tokens"] == {
        "total": 6,
        "min": 6,
        "p50": 6,
        "p90": 6,
        "p95": 6,
        "p99": 6,
        "max": 6,
    }
    assert found["quarantine"] == [
        {
            "origin": "a/000001.jsonl:2",
            "reason": "too_many_tokens",
            "remedy": "shorten the example, or raise ingest.max_tokens (10, ingest.max_tokens=6)",
        }
    ]


def test_a_row_that_the_chat_template_rejects_is_quarantined(run: Run, in_tmp: Path) -> None:
    config = in_tmp / "data/base/model/tokenizer_config.json"
    values = json.loads(config.read_text())
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    config.write_text(json.dumps(values | {"chat_template": refuse + values["chat_template"]}))
    row = chat(("system", "Be kind"), ("user", "Hi"), ("assistant", "Ho"))
    found = run({"a/000001.jsonl": row + b"\n" + json.dumps(GOOD).encode()})
    assert [(r["origin"], r["reason"]) for r in found["quarantine"]] == [
        ("a/000001.jsonl:1", "template_fails")
    ]
    assert len(found["examples"]) == 1


MAIL = chat(("user", "Mail ada@example.org"), ("assistant", "From 8.8.8.8?"))


def test_personal_data_is_reported_by_position_and_never_by_value(run: Run) -> None:
    found = run({"a/000001.jsonl": MAIL})
    assert found["pii"] == [
        {"origin": "a/000001.jsonl:1", "turn": 1, "field": "content", "kind": "email", "start": 5, "end": 20},
        {
            "origin": "a/000001.jsonl:1",
            "turn": 2,
            "field": "content",
            "kind": "ip_address",
            "start": 5,
            "end": 12,
        },
    ]
    assert found["summary"]["pii"] == {"a": {"email": 1, "ip_address": 1}}
    assert found["examples"][0]["messages"][0]["content"] == "Mail ada@example.org"


def test_redacted_data_is_in_no_output_and_not_in_the_cache(run: Run, in_tmp: Path) -> None:
    found = run({"a/000001.jsonl": MAIL}, pii="redact")
    texts = [message["content"] for message in found["examples"][0]["messages"]]
    assert texts == ["Mail [EMAIL]", "From [IP_ADDRESS]?"]
    files = [p for p in in_tmp.rglob("*") if p.is_file() and "raw" not in p.parts and p.suffix != ".parquet"]
    assert any("memo" in path.parts for path in files)
    assert not [path for path in files if b"ada@" in path.read_bytes()]


def test_redaction_changes_the_id_because_the_redacted_text_is_hashed(run: Run) -> None:
    ids = {run({"a/000001.jsonl": MAIL}, pii=mode)["examples"][0]["id"] for mode in ("report", "redact")}
    assert len(ids) == 2


def test_rows_with_personal_data_can_be_dropped(run: Run) -> None:
    found = run({"a/000001.jsonl": MAIL + b"\n" + json.dumps(GOOD).encode()}, pii="drop")
    assert [row["origin"] for row in found["examples"]] == ["a/000001.jsonl:2"]
    assert found["quarantine"][0]["remedy"].endswith("(1 email, 1 ip_address)")
    assert found["summary"]["pii"] == {"a": {"email": 1, "ip_address": 1}}


def test_too_many_bad_rows_fail_the_stage_and_are_listed() -> None:
    drops = Drops(Counter(a=100))
    drops.add("a", "not_utf8", "data/raw/a/000001.jsonl:7: not_utf8; save the file as UTF-8")
    require_rows(drops, 0.01)
    drops.add("a", "not_utf8", "data/raw/a/000001.jsonl:9: not_utf8; save the file as UTF-8")
    with pytest.raises(DataError, match=r"data/raw/a/000001\.jsonl:7: not_utf8; save"):
        require_rows(drops, 0.01)


def test_a_failed_stage_writes_the_quarantine_but_no_examples(run: Run, in_tmp: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 rows of all sources are dropped"):
        run({"a/000001.jsonl": json.dumps(GOOD).encode() + b"\n{\n"}, max_drop_rate=0.4)
    assert not (in_tmp / "data/ingest/examples.parquet").exists()
    assert "000001.jsonl:2" in (in_tmp / "data/ingest/quarantine.jsonl").read_text()


def test_no_data_at_all_is_an_error(run: Run) -> None:
    with pytest.raises(DataError, match="no rows"):
        run({})


def test_a_shard_that_changed_after_arrival_is_rejected(run: Run) -> None:
    digests = json.dumps({"a/000001.jsonl": "0" * 64}).encode()
    with pytest.raises(DataError, match=r"a/000001\.jsonl: changed after it arrived"):
        run({"a/000001.jsonl": json.dumps(GOOD).encode(), "digests.json": digests})


def test_a_file_that_is_not_a_shard_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.docx").write_text("x")
    with pytest.raises(DataError, match=r"notes\.docx: not a shard"):
        find_shards(tmp_path)


def test_csv_and_parquet_with_wrong_columns_or_types_are_quarantined_by_row(run: Run) -> None:
    buffer = io.BytesIO()
    table = pa.table({"messages": [7, None], "text": [["a"], None], "when": [datetime.date(2020, 1, 1)] * 2})
    pq.write_table(table, buffer)
    shards = {"a/000001.csv": b"frage,antwort\nHi,Ho\n", "a/000002.parquet": buffer.getvalue()}
    found = run(shards)["quarantine"]
    assert [(row["origin"], row["reason"]) for row in found] == [
        ("a/000001.csv:2", "unknown_format"),
        ("a/000002.parquet:1", "no_messages"),
        ("a/000002.parquet:2", "unknown_format"),
    ]
    assert found[0]["remedy"].endswith("keys seen (antwort, frage)")


def test_parquet_with_nested_turns_gives_the_same_example_as_json_lines(run: Run) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD | {"tools": None}]), buffer)
    shards = {"a/000001.jsonl": json.dumps(GOOD).encode(), "a/000002.parquet": buffer.getvalue()}
    first, second = run(shards)["examples"]
    assert second["origin"] == "a/000002.parquet:1"
    assert first["messages"] == second["messages"]


def test_only_the_sources_in_use_are_read_and_arrivals_keep_their_order(in_tmp: Path, run: Run) -> None:
    shards = {
        f"{source}/{arrival:06d}.jsonl": chat(("user", f"{source} {arrival}?"), ("assistant", "Yes"))
        for source, arrival in (("a", 3), ("b", 1), ("c", 2))
    }
    (in_tmp / "data/raw").mkdir(parents=True)
    (in_tmp / "data/raw/used.json").write_text('["a", "c"]')
    assert [row["origin"] for row in run(shards)["examples"]] == ["c/000002.jsonl:1", "a/000003.jsonl:1"]
    (in_tmp / "data/raw/used.json").write_text('["a", "b", "c"]')
    origins = [row["origin"] for row in run({})["examples"]]
    assert origins == ["b/000001.jsonl:1", "c/000002.jsonl:1", "a/000003.jsonl:1"]


PAIR = {"prompt": "Hi", "chosen": "Ho", "rejected": "Mail bob@example.org"}


def test_a_pair_trains_its_good_answer_and_keeps_the_bad_one_beside(run: Run) -> None:
    rows = [PAIR, {"prompt": "Hi", "completion": "Hm", "label": False}, GOOD]
    shard = b"\n".join(json.dumps(row).encode() for row in rows)
    found = run({"a/000001.jsonl": shard, "options.json": options(a={"preference": "compare"})})
    assert [row["messages"][-1]["content"] for row in found["examples"]] == [
        "Ho",
        GOOD["messages"][-1]["content"],
    ]
    texts = [
        [row[key] and [turn["content"] for turn in row[key]] for key in ("prompt", "chosen", "rejected")]
        for row in found["compared"]
    ]
    assert texts == [[["Hi"], ["Ho"], [PAIR["rejected"]]], [["Hi"], None, ["Hm"]]]
    assert [row["example_id"] for row in found["compared"]] == [found["examples"][0]["id"], None]
    assert found["quarantine"] == []
    assert found["summary"]["dropped"] == {"rejected_answer": 1}
    assert found["summary"]["compared"] == {"pairs": 1, "rejected": 1}
    assert [(span["kind"], span["turn"], span["field"]) for span in found["pii"]] == [
        ("email", 2, "rejected.content")
    ]


def test_personal_data_in_a_bad_answer_is_redacted_or_drops_the_row(run: Run) -> None:
    shards = {
        "a/000001.jsonl": b"\n".join(json.dumps(row).encode() for row in (PAIR, GOOD)),
        "options.json": options(a={"preference": "compare"}),
    }
    (row,) = run(shards, pii="redact")["compared"]
    assert row["rejected"][0]["content"] == "Mail [EMAIL]"
    found = run(shards, pii="drop", max_drop_rate=1.0)
    assert (len(found["examples"]), found["compared"]) == (1, [])
    assert found["quarantine"][0]["reason"] == "pii"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "Ho"}, "same_answer"),
        (
            {
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
                "rejected": [{"role": "user", "content": "Ha"}, {"role": "assistant", "content": "Hm"}],
            },
            "other_prompt",
        ),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": " "}, "empty_content"),
    ],
)
def test_a_pair_that_compares_nothing_is_refused(run: Run, row: dict[str, Any], reason: str) -> None:
    shard = b"\n".join(json.dumps(one).encode() for one in (row, GOOD))
    shards = {"a/000001.jsonl": shard, "options.json": options(a={"preference": "compare"})}
    found = run(shards, max_drop_rate=1.0)
    assert [one["reason"] for one in found["quarantine"]] == [reason]
    assert found["compared"] == []


def test_equal_comparisons_have_equal_ids_and_follow_the_id_of_an_export(run: Run) -> None:
    shard = b"\n".join([json.dumps(PAIR).encode()] * 2)
    source = {"preference": "compare", "mode": "replace"}
    found = run({"a/000001.jsonl": shard, "options.json": options(a=source)})
    first, second = found["compared"]
    assert first["id"] == second["id"]
    assert [row["example_id"] for row in found["compared"]] == [row["id"] for row in found["examples"]]
