"""Packed rows and the errors about examples that do not fit."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nightshift.core.errors import DataError, StageError
from nightshift.data.encode import Encoded
from tasks.pack import PackParams, packer
from tasks.pack import __main__ as stage
from tasks.pack.packer import pack, start_packer
from tasks.pack.spans import Numbers, SpanFile


@pytest.fixture
def spans(tmp_path: Path) -> Iterator[SpanFile]:
    with SpanFile.create(tmp_path) as spans:
        yield spans


def example(tokens: list[int], first_label: int, rounds: list[int] | None = None) -> Encoded:
    """Return tokens that carry labels from index `first_label` on."""
    ids = np.array(tokens, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) >= first_label, ids, np.int32(-100))
    return Encoded(ids, labels, np.array(rounds or [], dtype=np.int32))


def params(over_length: str, *, max_length: int = 8, share: float = 0.1) -> PackParams:
    return PackParams(
        packing=True,
        max_length=max_length,
        over_length=over_length,  # type: ignore[arg-type]
        max_lost_token_share=share,
        max_drop_rate=1.0,
        replay_share=None,
        seed=0,
    )


def test_rows_record_the_origin_of_every_span(spans: SpanFile, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = {
        "s/000001.jsonl:1": example([1, 2, 3, 4, 5], 2),
        "s/000001.jsonl:2": example([0, 7], 1),
        "s/000001.jsonl:3": example([8, 9, 10, 11, 12, 13, 14, 15, 16], 0),
        "s/000002.jsonl:1": example([17, 18, 19], 0),
    }
    tally = stage.Tally()
    for origin, encoded in examples.items():
        stage.add(len(tally.lengths), {"origin": origin}, [encoded], spans, params("split"), tally)
    assert (tally.lost, tally.supervised) == (Counter({"no_supervised_token": 1}), 13)
    # One row is written at a time.
    monkeypatch.setattr(stage, "TOKENS_PER_BATCH", 8)
    names = pa.table({"id": ["a", "b", "c", "d"], "origin": list(examples)})
    batches = list(stage.build_batches(spans, [[2, 1], [0, 3]], names))
    assert [batch.num_rows for batch in batches] == [1, 1]
    assert pa.Table.from_batches(batches).to_pylist() == [
        {
            "input_ids": [8, 9, 10, 11, 12, 13, 14, 15, 0, 7],
            "labels": [-100, 9, 10, 11, 12, 13, 14, 15, -100, 7],
            "seq_lengths": [8, 2],
            "example_ids": ["c", "b"],
            "origins": ["s/000001.jsonl:3", "s/000001.jsonl:2"],
            "starts": [0, 0],
        },
        {
            "input_ids": [1, 2, 3, 4, 5, 17, 18, 19],
            "labels": [-100, -100, 3, 4, 5, -100, 18, 19],
            "seq_lengths": [5, 3],
            "example_ids": ["a", "d"],
            "origins": ["s/000001.jsonl:1", "s/000002.jsonl:1"],
            "starts": [0, 0],
        },
    ]


def test_spans_of_equal_length_are_packed_in_order() -> None:
    assert pack([3, 2, 3, 2, 3], max_length=6) == [[0, 2], [4, 1], [3]]


def test_a_large_set_is_packed_in_parts_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    whole = packer._pack_batch
    monkeypatch.setattr(packer, "TOKENS_PER_BATCH", 10)

    def record(lengths: Numbers, max_length: int) -> list[Numbers]:
        sizes.append(lengths.tolist())
        return whole(lengths, max_length)

    monkeypatch.setattr(packer, "_pack_batch", record)
    assert pack([6, 6, 5, 1, 6, 1], max_length=7) == [[0], [1], [4, 3], [2], [5]]
    assert sizes == [[6, 6], [5, 1, 6], [1]]


def test_a_packer_that_is_killed_is_an_error_and_none_is_left() -> None:
    with pytest.raises(StageError, match="exit code -9"), start_packer() as call:
        (process,) = multiprocessing.active_children()
        process.kill()
        call([1], 8)
    with start_packer():
        (process,) = multiprocessing.active_children()
    assert process.exitcode is not None


def tally(spans: SpanFile, over_length: str, *examples: Encoded, max_length: int = 8) -> stage.Tally:
    counts = stage.Tally()
    for number, encoded in enumerate(examples, start=1):
        origin = {"origin": f"s/000001.jsonl:{number}"}
        stage.add(
            len(counts.lengths), origin, [encoded], spans, params(over_length, max_length=max_length), counts
        )
    return counts


def test_an_example_whose_longest_answer_is_lost_keeps_the_others(spans: SpanFile) -> None:
    counts, row = stage.Tally(), {"origin": "s/000001.jsonl:1"}
    answers = [example(list(range(1, length)), 1) for length in (5, 20)]
    stage.add(0, row, answers, spans, params("drop"), counts)
    stage.add(1, row, answers[1:], spans, params("drop"), counts)
    assert (spans.examples.tolist(), spans.lengths.tolist()) == ([0], [4])
    assert (counts.drops.read["s"], dict(counts.drops.by_reason())) == (2, {"over_length": 1})
    assert counts.lost == {"over_length": 38}


def test_the_share_of_lost_tokens_is_limited(spans: SpanFile) -> None:
    short, long = example(list(range(1, 9)), 1), example(list(range(1, 10)), 1)
    stage.require_fit(tally(spans, "drop", *[short] * 11, long), params("drop"))
    with pytest.raises(DataError, match="9 of 89 tokens would be lost"):
        stage.require_fit(tally(spans, "drop", *[short] * 10, long), params("drop"))
    with pytest.raises(
        DataError, match=r"9 of 889 tokens are in examples longer than pack.max_length=8; p99"
    ):
        stage.require_fit(tally(spans, "error", *[short] * 110, long), params("error"))


def test_losing_all_tokens_is_an_error(spans: SpanFile) -> None:
    with pytest.raises(DataError, match="9 of 9 tokens"):
        stage.require_fit(tally(spans, "drop", example(list(range(1, 10)), 1)), params("drop", share=1.0))
    with pytest.raises(DataError, match="no examples to pack"):
        stage.require_fit(tally(spans, "drop"), params("drop", share=1.0))


def advice(spans: SpanFile, over_length: str, lengths: list[int], *, chat: bool = False) -> str:
    """Return the advice for examples of these lengths, each a plain text or one round."""
    found = [example([7] * length, 1, [0] if chat else []) for length in lengths]
    counts = tally(spans, over_length, *found, max_length=384)
    return stage.suggest(counts, params(over_length, max_length=384, share=0.02))


def test_an_error_names_row_lengths_that_are_enough(spans: SpanFile) -> None:
    lengths = [300] * 150 + [561] * 49 + [1204]
    assert advice(spans, "drop", lengths) == (
        "p99 is 561 tokens, the longest example 1204: set pack.max_length=384 to 576 (keeps 99.5% of the "
        "examples) or 1216 (keeps 100.0% of the examples), or set pack.over_length: split (loses 0 tokens)"
    )
    # Cut between rounds, a chat of one round does not get shorter.
    assert "split" not in advice(spans, "drop", lengths, chat=True)
    assert "split" not in advice(spans, "split", lengths)


def test_the_suggested_row_length_loses_no_more_than_allowed(spans: SpanFile) -> None:
    """The longest 1 % of the examples have a third of the tokens, so keeping 99 % is not enough."""
    lengths = [300] * 390 + [500] * 6 + [15990] * 4
    assert "set pack.max_length=384 to 16000 (keeps 100.0%" in advice(spans, "drop", lengths, chat=True)
    assert "set pack.max_length=384 to 1216 (keeps 100.0%" in advice(spans, "error", [300] * 99 + [561, 1204])


def test_only_the_longest_is_suggested_if_nearly_all_examples_fit(spans: SpanFile) -> None:
    text = advice(spans, "drop", [300] * 999 + [9000], chat=True)
    assert text == (
        "p99 is 300 tokens, the longest example 9000: set pack.max_length=384 to 9024 (keeps 100.0% of the "
        "examples)"
    )
