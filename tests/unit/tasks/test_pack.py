"""Spans and packed rows, with TRL's packer."""

from collections import Counter

import numpy as np
import pytest

from nightshift.core.errors import DataError
from nightshift.data.encode import Encoded
from tasks.pack import PackParams, Span, build_rows, fit, join, pack, require_fit


def example(tokens: list[int], first_label: int) -> Encoded:
    """Return tokens that carry labels from index `first_label` on."""
    ids = np.array(tokens, dtype=np.int32)
    return Encoded(ids, np.where(np.arange(len(ids)) >= first_label, ids, np.int32(-100)))


def test_rows_record_the_origin_of_every_span() -> None:
    corpus = join(
        [example([1, 2, 3, 4, 5], 2), example([6, 7], 1), example([8, 9, 10], 1), example([11, 12, 13], 0)],
        ["a", "b", "c", "d"],
        ["s/000001.jsonl:1", "s/000001.jsonl:2", "s/000001.jsonl:3", "s/000002.jsonl:1"],
    )
    spans, dropped, lost = fit(corpus, 4, "split")
    assert spans == [Span(0, 0, 4), Span(1, 0, 2), Span(2, 0, 3), Span(3, 0, 3)]
    assert (dropped, +lost) == ({}, Counter({"no_supervised_token": 1}))
    table = build_rows(corpus, spans, pack([4, 2, 3, 3], 6))
    assert table.to_pylist() == [
        {
            "input_ids": [1, 2, 3, 4, 6, 7],
            "labels": [-100, -100, 3, 4, -100, 7],
            "seq_lengths": [4, 2],
            "example_ids": ["a", "b"],
            "origins": ["s/000001.jsonl:1", "s/000001.jsonl:2"],
            "starts": [0, 0],
        },
        {
            "input_ids": [8, 9, 10, 11, 12, 13],
            "labels": [-100, 9, 10, -100, 12, 13],
            "seq_lengths": [3, 3],
            "example_ids": ["c", "d"],
            "origins": ["s/000001.jsonl:3", "s/000002.jsonl:1"],
            "starts": [0, 0],
        },
    ]


@pytest.mark.parametrize(
    ("policy", "spans", "dropped", "lost"),
    [
        ("drop", [], {0: "over_length"}, {"over_length": 9}),
        ("error", [], {0: "over_length"}, {"over_length": 9}),
        ("truncate", [Span(0, 0, 4)], {}, {"over_length": 5}),
        ("split", [Span(0, 0, 4), Span(0, 4, 8)], {}, {"no_supervised_token": 1}),
    ],
)
def test_each_policy_for_an_example_that_is_too_long(
    policy: str, spans: list[Span], dropped: dict[int, str], lost: dict[str, int]
) -> None:
    corpus = join([example(list(range(1, 10)), 2)], ["a"], ["s/000001.jsonl:1"])
    found = fit(corpus, 4, policy)  # type: ignore[arg-type]
    assert (found[0], found[1], +found[2]) == (spans, dropped, Counter(lost))


def test_truncation_that_cuts_off_the_answer_drops_the_example() -> None:
    corpus = join([example(list(range(1, 10)), 6)], ["a"], ["s/000001.jsonl:1"])
    spans, dropped, lost = fit(corpus, 4, "truncate")
    assert spans == []
    assert dropped == {0: "over_length"}
    assert lost == {"over_length": 5, "no_supervised_token": 4}


def params(over_length: str) -> PackParams:
    return PackParams(
        packing=True, max_length=8, over_length=over_length, max_lost_token_share=0.1, max_drop_rate=1.0
    )  # type: ignore[arg-type]


def test_the_share_of_lost_tokens_is_limited() -> None:
    require_fit(Counter(over_length=10), 100, params("drop"))
    with pytest.raises(DataError, match="11 of 100 tokens"):
        require_fit(Counter(over_length=9, no_supervised_token=2), 100, params("truncate"))
    with pytest.raises(DataError, match="1 of 100 tokens are in examples longer"):
        require_fit(Counter(over_length=1), 100, params("error"))


def test_losing_all_tokens_is_an_error() -> None:
    everything = PackParams(
        packing=True, max_length=8, over_length="drop", max_lost_token_share=1.0, max_drop_rate=1.0
    )
    with pytest.raises(DataError, match="9 of 9 tokens"):
        require_fit(Counter(over_length=9), 9, everything)
    with pytest.raises(DataError, match="no examples to pack"):
        join([], [], [])
