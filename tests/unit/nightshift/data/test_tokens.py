"""The stream of encoded conversations, and its cache."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nightshift.data import tokens
from nightshift.data.encode import Encoded, Encoder, Fault, load_encoder
from nightshift.data.template import Template
from nightshift.data.tokens import encode_known, encode_stream, open_memo
from tests.helpers.byte_base import make_byte_base


@pytest.fixture
def encoder(in_tmp: Path) -> Encoder:
    return load_encoder(make_byte_base(in_tmp / "base"))


def chat(*turns: str) -> tuple[list[dict[str, Any]], None]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)], None


def answer(encoder: Encoder, sequences: list[Encoded] | Fault | None) -> str:
    assert isinstance(sequences, list)
    (one,) = sequences
    return str(encoder.tokenizer.decode([label for label in one.labels.tolist() if label != -100]))


def test_encoded_conversations_are_read_from_the_cache(encoder: Encoder) -> None:
    conversations = [chat("Hi", "Hello."), chat("Hi", "Hello."), chat("a", "b", "c", "d")]
    with open_memo(encoder) as memo:
        first = encode_known(conversations, encoder, memo)
        again = encode_known(conversations, replace(encoder, template=Template("{{ broken", {})), memo)
    for sequences, others in zip(first, again, strict=True):
        assert isinstance(sequences, list)
        assert isinstance(others, list)
        (one,), (other,) = sequences, others
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.rounds.tolist() == other.rounds.tolist()


def test_items_keep_their_order_with_faults_repeats_and_nothing_to_encode(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_ROWS", 2)
    check = "{% if messages[0].content == 'x' %}{{ raise_exception('x') }}{% endif %}"
    assert encoder.template
    source = check + encoder.template.source
    failing = replace(encoder, template=replace(encoder.template, source=source))
    items = [
        (0, chat("q", "one")),
        (1, None),
        (2, chat("x", "y")),
        (3, chat("q", "one")),
        (4, chat("q", "two")),
    ]
    with open_memo(failing) as memo:
        found = dict(encode_stream(items, failing, memo))
    assert list(found) == [0, 1, 2, 3, 4]
    assert (found[1], found[2]) == (None, Fault("template_fails", "x"))
    assert [answer(encoder, found[i]) for i in (0, 3, 4)] == ["one", "one", "two"]


def test_the_next_batch_is_read_while_one_is_tokenized_and_no_more(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 4)
    read = 0

    def items() -> Iterator[tuple[int, Any]]:
        nonlocal read
        for read in range(1, 6):
            yield read, chat("ab", "cd")

    with open_memo(encoder) as memo:
        stream = encode_stream(items(), encoder, memo)
        assert [(next(stream)[0], read) for _ in range(4)] == [(1, 2), (2, 3), (3, 4), (4, 5)]
        assert next(stream)[0] == 5
