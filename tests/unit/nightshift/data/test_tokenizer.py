"""Two libraries tokenize: the results are those of tokenizers, or an error."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from nightshift.core.errors import StageError
from nightshift.data import tokenizer as module
from nightshift.data.tokenizer import find_tokens, load_fast

TEXTS = ["Gallium melts at 29.76 °C.", "naïve 🙂", "", "def f(x):\n    return x"]


@pytest.fixture(autouse=True)
def always_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY_CHARACTERS", 0)
    load_fast.cache_clear()


@pytest.fixture
def engine(tiny_base: Any) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_base / "tokenizer.json"))


def ids(texts: Sequence[str], engine: Tokenizer) -> list[list[int]]:
    return [one.ids.tolist() for one in find_tokens(engine, texts)]


def expected(texts: Sequence[str], engine: Tokenizer) -> list[list[int]]:
    return [one.ids for one in engine.encode_batch(texts, add_special_tokens=False)]


def test_both_libraries_give_the_same_tokens(engine: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_fast(engine)
    assert ids(TEXTS, engine) == expected(TEXTS, engine)
    monkeypatch.setitem(sys.modules, "fastokens", None)
    load_fast.cache_clear()
    assert load_fast(engine) is None
    assert ids(TEXTS, engine) == expected(TEXTS, engine)


def test_a_difference_in_a_text_is_an_error(engine: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = load_fast(engine)
    assert fast
    # The same bytes in other tokens.
    bytewise = [engine.encode(sign, add_special_tokens=False).ids[0] for sign in "Gallium"]

    def encode_batch_flat(_self: Any, texts: list[str]) -> tuple[bytes, bytes]:
        found = [bytewise if text == "Gallium" else expected([text], engine)[0] for text in texts]
        edges = [sum(map(len, found[:i])) for i in range(len(found) + 1)]
        flat = b"".join(token.to_bytes(4, "little") for one in found for token in one)
        return flat, b"".join(edge.to_bytes(8, "little") for edge in edges)

    wrong = type("Wrong", (), {"encode_batch_flat": encode_batch_flat})()
    monkeypatch.setattr(module, "load_fast", lambda _: replace(fast, tokenizer=wrong))
    with pytest.raises(StageError, match=r"fastokens .* tokenizes a text differently .*'Gallium'; uninstall"):
        find_tokens(engine, ["Gallium", "x"])


def test_texts_that_are_not_the_bytes_of_their_tokens_are_left_to_tokenizers(engine: Tokenizer) -> None:
    # The token takes the white space around it.
    engine.add_special_tokens([AddedToken("<call>", special=True, lstrip=True, rstrip=True)])
    load_fast.cache_clear()
    assert load_fast(engine) is None
    texts = ["a <call> b", "ab"]
    assert ids(texts, engine) == expected(texts, engine)
