"""The split to which each example is assigned."""

from pathlib import Path
from typing import Any

import pytest

from nightshift.core.errors import DataError
from nightshift.core.files import read_json, read_rows, write_rows
from nightshift.data.prompts import list_prompts
from nightshift.data.schemas import CONNECTED, PREFERENCES
from nightshift.data.text import canonical_messages
from tasks.dedupe.__main__ import REMOVED_SCHEMA
from tasks.split import SplitParams, assign, connect, main, row_keys, split_of


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
            "prompts": [],
        }
        for source in ("facts", "chats")
        for i in range(20)
    ]
    write_rows(Path("data/dedupe/examples.parquet"), rows, CONNECTED)
    write_rows(Path("data/dedupe/removed.parquet"), [], REMOVED_SCHEMA)
    write_rows(Path("data/ingest/preferences.parquet"), [], PREFERENCES)
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
            "prompts": [],
        }
        for i in (0, 8, 21)
    ]
    write_rows(Path("data/dedupe/examples.parquet"), rows, CONNECTED)
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
    write_rows(Path("data/ingest/preferences.parquet"), [], PREFERENCES)
    main()
    assert read_rows(Path("data/split/bridges.parquet")) == [
        {"id": "bridge", "near_ids": ["id-0", "id-8"], "sides": ["train", "test"]}
    ]
    assert read_json(Path("data/split/summary.json"))["rows_out_by_side"] == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }


PARAMS = SplitParams(validation_share=0.05, test_share=0.1, by_phrasing=["facts"], seed=0)


def row(group_id: str, group: str | None = None, source: str = "chats", *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return with_prompts(
        {"id": group_id, "source": source, "group_id": group_id, "group": group, "messages": messages}
    )


def with_prompts(one: dict[str, Any]) -> dict[str, Any]:
    texts = [canonical_messages([message]) for message in one["messages"]]
    return one | {"prompts": list_prompts(one["messages"], texts)}


def chat(group_id: str, *turns: str) -> dict[str, Any]:
    return row(group_id, None, "chats", *turns)


def sides(*rows: dict[str, Any]) -> list[str]:
    return assign(rows, connect(map(row_keys, rows)), PARAMS)


def test_rows_with_equal_values_of_the_group_column_are_on_one_side() -> None:
    # By content alone, these are on the sides train, test, validation.
    assert sides(row("group-0"), row("group-8"), row("group-21")) == ["train", "test", "validation"]
    together = sides(row("group-0", "x"), row("group-8", "x"), row("group-21", "y"), row("group-21", "x"))
    assert len(set(together)) == 1


def test_new_rows_change_no_side_and_the_first_row_of_a_group_may_go() -> None:
    rows = [row(f"group-{i}", f"customer-{i % 50}") for i in range(400)]
    before = sides(*rows)
    assert set(before) == {"train", "validation", "test"}
    more = [row(f"later-{i}", f"customer-{i % 90}") for i in range(400)]
    assert sides(*rows, *more)[:400] == before
    assert sides(*rows[50:]) == before[50:]


def test_a_group_with_a_source_by_phrasing_goes_to_train() -> None:
    pairs = [(row("g", f"customer-{i}"), row("h", f"customer-{i}", "facts")) for i in range(100)]
    assert {sides(one)[0] for one, _ in pairs} == {"train", "validation", "test"}
    assert {side for pair in pairs for side in sides(*pair)} == {"train"}


LONG = "Where is the parcel that I sent to my aunt last week?"


def test_several_answers_to_one_prompt_are_on_one_side() -> None:
    # By content alone, these are on the sides train, test, validation.
    rows = [chat("group-0", "Who?", "Me."), chat("group-8", "who", "You."), chat("group-21", "Why?", "Me.")]
    assert sides(*rows) == ["train", "train", "validation"]


def test_a_conversation_and_its_continuations_are_on_one_side() -> None:
    first = chat("group-0", LONG, "It is in Rome.")
    longer = chat("group-8", LONG, "It is in Rome.", "When will it arrive?", "Tomorrow.")
    branch = chat("group-21", LONG, "It is in Rome.", "Can I send it back?", "Yes.")
    other = chat("group-32", LONG + " Quick!", "It is in Oslo.", "When will it arrive?", "Tomorrow.")
    assert sides(first, longer, branch, other) == ["train", "train", "train", "test"]
    assert sides(longer, branch, other) == ["test", "test", "test"]
    assert sides(branch, longer) == ["validation", "validation"]


def test_conversations_that_begin_with_the_same_greeting_are_not_connected() -> None:
    rows = [
        chat(
            f"group-{i}", "Hello!", "Hi, how can I help?", f"Tell me about topic {i} in some detail", f"a{i}"
        )
        for i in range(100)
    ]
    assert set(sides(*rows)) == {"train", "validation", "test"}


def test_a_system_prompt_alone_connects_nothing() -> None:
    system = [{"role": "system", "content": " ".join(["word"] * 50)}]
    rows = [chat(f"group-{i}", "Hello!", "Hi!", f"Topic {i}?", f"a{i}") for i in range(100)]
    rows = [with_prompts(one | {"messages": system + one["messages"]}) for one in rows]
    assert set(sides(*rows)) == {"train", "validation", "test"}


def test_a_row_without_a_group_keeps_the_side_of_its_content() -> None:
    assert sides(row("group-0"), row("group-8"), row("x", "a"), row("y", "a"))[:2] == ["train", "test"]


def test_one_group_for_all_rows_is_an_error_that_names_group_by(in_tmp: Path) -> None:
    (in_tmp / "params.yaml").write_text(
        "split: {validation_share: 0.05, test_share: 0.1, by_phrasing: [], seed: 0}"
    )
    rows = [{**row(f"g{i}", "same"), "messages": [], "origin": "x:1", "arrival": 1} for i in range(9)]
    write_rows(Path("data/dedupe/examples.parquet"), rows, CONNECTED)
    write_rows(Path("data/dedupe/removed.parquet"), [], REMOVED_SCHEMA)
    write_rows(Path("data/ingest/preferences.parquet"), [], PREFERENCES)
    with pytest.raises(
        DataError, match=r"0 of 9 examples, which form 1 group\(s\); .* `group_by` with more values"
    ):
        main()


def test_a_comparison_goes_where_its_example_or_its_prompt_is(in_tmp: Path) -> None:
    (in_tmp / "params.yaml").write_text(
        "split: {validation_share: 0.05, test_share: 0.1, by_phrasing: [], seed: 0}"
    )
    prompts = [[{"role": "user", "content": f"Question {i}"}] for i in range(3)]
    digests = [list_prompts([*p, {"role": "assistant"}], [canonical_messages(p), ""]) for p in prompts]
    rows = [
        {
            "id": f"id-{i}",
            "messages": [],
            "source": "s",
            "origin": "x:1",
            "arrival": 1,
            "group_id": f"group-{i}",
            "prompts": digest,
        }
        for i, digest in zip((0, 8, 21), digests, strict=True)
    ]
    write_rows(Path("data/dedupe/examples.parquet"), rows, CONNECTED)
    removed = [
        {"id": name, "near_ids": ["id-8"], "kept_id": "id-8", "jaccard": 1.0, "reason": reason}
        for name, reason in (("twin", "normalized_duplicate"), ("near", "near_duplicate"))
    ]
    write_rows(Path("data/dedupe/removed.parquet"), removed, REMOVED_SCHEMA)
    bad = [{"role": "assistant", "content": "Bad"}]
    names = [("a", "id-0"), ("b", "id-8"), ("b", "id-8"), ("c", "twin"), ("d", "near")]
    compared = [
        {"id": name, "example_id": example, "prompt": [], "rejected": bad, "source": "s"}
        for name, example in names
    ]
    compared += [
        {"id": f"alone-{i}", "example_id": None, "prompt": prompt, "rejected": bad, "source": "s"}
        for i, prompt in enumerate(prompts)
    ]
    write_rows(Path("data/ingest/preferences.parquet"), compared, PREFERENCES)
    main()
    placed = read_rows(Path("data/split/preferences.parquet"))
    assert [(row["id"], row["example_id"], row["side"]) for row in placed] == [
        ("a", "id-0", "train"),
        ("b", "id-8", "test"),
        ("c", "id-8", "test"),
        ("alone-0", None, "train"),
        ("alone-1", None, "test"),
        ("alone-2", None, "validation"),
    ]
    assert read_json(Path("data/split/summary.json"))["compared"] == {
        **{"exact_duplicate": 1, "near_duplicate": 1},
        **{"test": 3, "train": 2, "validation": 1},
    }
