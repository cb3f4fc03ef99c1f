"""Masks and packing, with the real tokenizer and TRL's packer."""

from typing import Any

import pytest

from tasks.errors import DataError
from tasks.pack import PackParams, encode, pack, require_fit


def test_only_the_answers_and_their_stop_tokens_carry_labels(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]
    encoded = encode(messages, tokenizer)
    labelled = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(labelled) == "Hello.<|im_end|>Me.<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_mask_survives_spaces_and_emoji_at_the_edges(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "naïve 🙂!"}]
    labelled = [label for label in encode(messages, tokenizer)["labels"] if label != -100]
    assert tokenizer.decode(labelled) == "naïve 🙂!<|im_end|>"


class RewritingTokenizer:
    """A chat template that changes earlier turns when a later one is added."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"{len(messages)}:" + "".join(m["content"] for m in messages)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="turn by turn"):
        encode(messages, RewritingTokenizer())


def test_best_fit_decreasing_fills_rows_and_keeps_provenance() -> None:
    encoded = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate((5, 2, 3, 1))]
    rows = pack(encoded, ["a", "b", "c", "d"], max_length=6)
    assert [(row["seq_lengths"], row["example_ids"]) for row in rows] == [
        ([5, 1], ["a", "d"]),
        ([3, 2], ["c", "b"]),
    ]
    assert rows[0]["labels"] == [-100, 0, 0, 0, 0, -100]


def test_over_length_examples_are_dropped_up_to_a_share_and_no_further() -> None:
    params = PackParams(max_length=8, over_length="drop", max_lost_token_share=0.1)
    require_fit(10, 100, params)
    with pytest.raises(DataError, match="11 of 100 tokens"):
        require_fit(11, 100, params)
    with pytest.raises(DataError, match="1 of 100 tokens"):
        require_fit(1, 100, params.model_copy(update={"over_length": "error"}))
    with pytest.raises(DataError, match="no examples to pack"):
        require_fit(0, 0, params)
