"""Spans of an example that is too long."""

from collections import Counter

import numpy as np
import pytest

from nightshift.data.encode import Encoded
from tasks.pack import OverLength
from tasks.pack.spans import Span, cut, fit, join_rounds


def example(length: int, first_label: int, rounds: tuple[int, ...] = ()) -> Encoded:
    """Return tokens that carry labels from index `first_label` on."""
    ids = np.arange(1, length + 1, dtype=np.int32)
    labels = np.where(np.arange(length) >= first_label, ids, np.int32(-100))
    return Encoded(ids, labels, np.array(rounds, dtype=np.int32))


@pytest.mark.parametrize(
    ("policy", "spans", "lost"),
    [
        ("drop", [], {"over_length": 9}),
        ("error", [], {"over_length": 9}),
        ("truncate", [Span(0, 4)], {"over_length": 5}),
        ("split", [Span(0, 4), Span(4, 8)], {"no_supervised_token": 1}),
    ],
)
def test_each_policy_for_a_text_that_is_too_long(
    policy: OverLength, spans: list[Span], lost: dict[str, int]
) -> None:
    assert fit(example(9, 2), 4, policy) == (spans, Counter(lost))


def test_a_chat_is_split_between_rounds() -> None:
    """The rounds have 3, 1, 5 and 2 tokens; the third does not fit."""
    chat = example(11, 1, (0, 3, 4, 9))
    assert fit(chat, 4, "split") == ([Span(0, 4), Span(9, 11)], Counter({"over_length": 5}))
    assert fit(chat, 5, "split") == ([Span(0, 4), Span(4, 9), Span(9, 11)], Counter())
    assert fit(chat, 11, "split") == ([Span(0, 11)], Counter())


def test_a_chat_of_one_long_round_is_not_split() -> None:
    assert fit(example(9, 2, (0,)), 4, "split") == ([], Counter({"over_length": 9}))
    assert cut(9, [0], 4, "truncate") == [Span(0, 4)]


def test_rounds_apart_are_not_joined() -> None:
    assert join_rounds([0, 9, 11, 13], 4) == [Span(9, 13)]
    assert join_rounds([0, 2, 11, 13], 4) == [Span(0, 2), Span(11, 13)]


def test_truncation_that_cuts_off_the_answer_keeps_nothing() -> None:
    assert fit(example(9, 6), 4, "truncate") == ([], Counter({"over_length": 5, "no_supervised_token": 4}))
