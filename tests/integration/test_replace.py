"""Sources over several nights, from params.yaml to packed rows: exports, mended files, limits, weights."""

import json
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.errors import DataError
from nightshift.core.files import read_json, read_rows, tree_digest
from nightshift.registry.lineage import trained_rows
from tests.helpers.byte_base import make_byte_base
from tests.helpers.checkouts import ROOT

STAGES = (
    *("ingest.__main__", "dedupe.__main__", "split"),
    *("augment.__main__", "decontaminate.__main__", "pack.__main__"),
)
WORDS = [
    "apple",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "guitar",
    "harbor",
    "island",
    "jungle",
    "kettle",
    "ladder",
    "mirror",
    "needle",
]
Night = Callable[..., dict[str, Any]]
Row = dict[str, Any]


def chat(number: int, answer: str = "", **more: object) -> Row:
    """Return a conversation that resembles no other."""
    words = [WORDS[(number * 7 + i * i * (number % 5 + 1)) % len(WORDS)] + str(number) for i in range(10)]
    turns = [("user", " ".join(words[:5]) + "?"), ("assistant", answer or " ".join(words[5:]))]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(name: str, *rows: Row | str) -> None:
    """Write a file of a source."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(f"{text}\n" for text in texts))


@pytest.fixture
def night(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    """Return a function that takes in sources and runs the data stages, and returns all summaries."""
    make_byte_base(in_tmp / "data/base/model")
    # No champion: the registry is not the subject.
    monkeypatch.setattr("tasks.snapshot.__main__.update_champion", lambda: None)

    def run(last: str = "pack", **sources: Any) -> dict[str, Any]:
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["snapshot"] = {"sources": sources, "benchmarks": {}}
        params["split"] |= {"test_share": 0.2, "validation_share": 0.1}
        params["pack"]["max_length"] = 4096
        (in_tmp / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        import_module("tasks.snapshot.__main__").main()
        for stage in STAGES:
            import_module(f"tasks.{stage}").main()
            if stage.startswith(last):
                break
        return {path.parent.name: read_json(path) for path in Path("data").glob("*/summary.json")}

    return run


def answers() -> set[str]:
    """Return the answers of all examples that ingest accepted."""
    return {row["messages"][-1]["content"] for row in read_rows(Path("data/ingest/examples.parquet"))}


def rows() -> list[str]:
    """Return the ids of all examples that ingest accepted."""
    return [row["id"] for row in read_rows(Path("data/ingest/examples.parquet"))]


def test_equal_rows_of_an_export_have_different_ids(night: Night) -> None:
    write("export.jsonl", chat(0), chat(0), chat(1))
    night("ingest", crm={"path": "export.jsonl", "mode": "replace"})
    assert len(set(rows())) == 3


def test_a_corrected_and_a_deleted_row_leave_training_the_next_night(night: Night) -> None:
    source = {"path": "export.jsonl", "mode": "replace"}
    write("export.jsonl", chat(0, "Within 14 days."), *map(chat, range(1, 40)))
    first = night(crm=source)
    assert "Within 14 days." in answers()
    assert "shards_withdrawn" not in first["snapshot"] or first["snapshot"]["shards_withdrawn"] == {}
    ids = set(rows())
    # Row 0 is corrected, row 1 deleted, row 40 new.
    write("export.jsonl", chat(0, "Within 30 days."), *map(chat, range(2, 41)))
    second = night(crm=source)
    assert answers() == {
        one["messages"][-1]["content"] for one in [chat(0, "Within 30 days."), *map(chat, range(2, 41))]
    }
    assert second["snapshot"]["shards"] == {"crm": 1}
    assert second["snapshot"]["shards_withdrawn"] == {"crm": 1}
    assert second["dedupe"]["dropped"] == {}
    # The ids of the other rows are the same, so versions can be compared row by row.
    assert (len(ids - set(rows())), len(set(rows()) - ids), len(ids & set(rows()))) == (2, 2, 38)
    # The lineage lists the rows of the newest export only; the old shard is still there.
    assert {origin.partition(":")[0] for _, origin in trained_rows()} == {"crm/000002.jsonl"}
    assert Path("data/raw/crm/000001.jsonl").is_file()
    # A third night without a change, and a return to the first export.
    before = tree_digest(Path("data/raw")), tree_digest(Path("data/pack"))
    night(crm=source)
    assert (tree_digest(Path("data/raw")), tree_digest(Path("data/pack"))) == before
    write("export.jsonl", chat(0, "Within 14 days."), *map(chat, range(1, 40)))
    night(crm=source)
    assert {origin.partition(":")[0] for _, origin in trained_rows()} == {"crm/000001.jsonl"}


def test_an_unchanged_row_of_a_new_export_keeps_its_side_and_its_place(night: Night) -> None:
    source = {"path": "export.jsonl", "mode": "replace"}
    write("export.jsonl", *map(chat, range(60)))
    write("more/a.jsonl", *map(chat, range(50, 100)))
    night(crm=source, more="more/*.jsonl")

    def held_out() -> set[str]:
        return {row["messages"][0]["content"] for row in read_rows(Path("data/split/test.parquet"))}

    before = held_out()
    assert len(before) > 5
    write("export.jsonl", *map(chat, range(60)), chat(200))
    summaries = night(crm=source, more="more/*.jsonl")
    assert before - held_out() == set()
    assert len(held_out() - before) <= 1
    # As in the first night, the rows of the other source are the copies.
    assert summaries["dedupe"]["dropped_by_source"] == {"more": {"exact_duplicate": 10}}


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_mending_a_bad_file_mends_the_run(mode: str, night: Night) -> None:
    source = {"path": "rows", "mode": mode}
    write("rows/a.jsonl", *map(chat, range(30)), *["not json"] * 12)
    write("rows/b.jsonl", *map(chat, range(30, 60)))
    with pytest.raises(
        DataError, match=r"12 of 72 rows .* fix the rows in their file and run `nightshift snapshot`"
    ):
        night(mine=source)
    write("rows/a.jsonl", *map(chat, range(30)), *map(chat, range(100, 112)))
    summaries = night(mine=source)
    assert summaries["ingest"]["dropped"] == {}
    # In mode append, the good rows of the old version stay in use.
    assert summaries["ingest"]["rows_out"] == {"append": 102, "replace": 72}[mode]
    assert summaries["ingest"].get("rows_mended") == {"append": {"mine": 12}, "replace": None}[mode]
    assert summaries["dedupe"]["rows_out"] == 72


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_completing_a_truncated_file_mends_the_run(mode: str, night: Night) -> None:
    import gzip

    source = {"path": "rows.jsonl.gz", "mode": mode}
    packed = gzip.compress("".join(json.dumps(chat(i)) + "\n" for i in range(40)).encode())
    Path("rows.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match="damaged or truncated"):
        night("ingest", mine=source)
    Path("rows.jsonl.gz").write_bytes(packed)
    assert night("dedupe", mine=source)["dedupe"]["rows_out"] == 40


def test_the_limit_of_a_source_is_counted_and_its_other_rows_are_not_read(night: Night) -> None:
    write("a.jsonl", *map(chat, range(50)), *["not json"] * 50)
    write("b.jsonl", *map(chat, range(100, 200)))
    summary = night("ingest", a={"path": "a.jsonl", "limit": 40}, b={"path": "b.jsonl", "limit": 0.5})[
        "ingest"
    ]
    beyond = summary["rows_over_limit"]
    assert beyond["a"] == 60
    assert 30 < beyond["b"] < 70
    assert (summary["rows_in"], summary["dropped"]) == (200 - 60 - beyond["b"], {})


def test_the_weight_of_a_source_is_how_often_its_examples_are_trained(night: Night) -> None:
    for name, start in (("once", 0), ("twice", 100), ("half", 200)):
        write(f"{name}.jsonl", *map(chat, range(start, start + 60)))
    summaries = night(
        once="once.jsonl",
        twice={"path": "twice.jsonl", "weight": 2},
        half={"path": "half.jsonl", "weight": 0.5},
    )
    trained = Counter(row["source"] for row in read_rows(Path("data/decontaminate/train.parquet")))
    spans = Counter(origin for row in read_rows(Path("data/pack/train.parquet")) for origin in row["origins"])
    copies = {name: Counter() for name in trained}
    for origin, count in spans.items():
        copies[origin.partition("/")[0]][count] += 1
    pack = summaries["pack"]
    assert copies["once"] == {1: trained["once"]}
    assert copies["twice"] == {2: trained["twice"]}
    assert copies["half"] == {1: trained["half"] - pack["dropped"]["weight"]}
    assert 10 < copies["half"][1] < trained["half"] - 10
    assert pack["rows_in"] == summaries["decontaminate"]["rows_out"]
    assert pack["added"] == trained["twice"]
    assert pack["copies_by_source"] == {"twice": trained["twice"]}
    assert pack["left_out_by_source"] == {"half": pack["dropped"]["weight"]}


def test_rows_of_one_group_are_on_one_side(night: Night) -> None:
    rows = [chat(i, metadata={"customer": i % 25}) for i in range(200)]
    write("a.jsonl", *rows)
    summaries = night("split", a={"path": "a.jsonl", "group_by": "metadata.customer"})
    sides: dict[int, set[str]] = {}
    by_question = {row["messages"][0]["content"]: row["metadata"]["customer"] for row in rows}
    for side in ("train", "validation", "test"):
        for row in read_rows(Path(f"data/split/{side}.parquet")):
            sides.setdefault(by_question[row["messages"][0]["content"]], set()).add(side)
    assert {len(one) for one in sides.values()} == {1}
    assert set().union(*sides.values()) == {"train", "validation", "test"}
    assert summaries["split"]["groups"] == 25
    with pytest.raises(DataError, match=r"a\.group_by: none of 200 rows has a value of 'metadata\.custmer'"):
        night("ingest", a={"path": "a.jsonl", "group_by": "metadata.custmer"})


def test_a_source_that_params_yaml_no_longer_lists_is_named_in_the_log(
    night: Night, caplog: pytest.LogCaptureFixture
) -> None:
    write("a.jsonl", *map(chat, range(40)))
    night("ingest", old="a.jsonl", new="a.jsonl")
    assert "unused" not in caplog.text
    night("ingest", new="a.jsonl")
    assert caplog.text.count("not listed in params.yaml, unused: source old: 1 shard, ") == 1
