"""The tokens of a pair: the prompt once, and both answers up to their stop tokens."""

from pathlib import Path

import numpy as np
import pytest

from nightshift.core.files import write_rows
from nightshift.data.encode import Encoded, Fault, load_encoder
from nightshift.data.schemas import PLACED_PREFERENCES
from tasks.prefer.rows import make_answers, make_pair, read_comparisons
from tests.helpers.byte_base import make_byte_base
from tests.helpers.prefer import comparison


def encoded(*tokens: int, labelled: int) -> list[Encoded]:
    """Return a sequence whose last tokens but one have labels."""
    ids = np.array([*tokens, 9], dtype=np.int32)
    labels = np.full(len(ids), -100, dtype=np.int32)
    labels[-1 - labelled : -1] = ids[-1 - labelled : -1]
    return [Encoded(ids, labels)]


def test_a_pair_has_the_prompt_once_and_ends_with_the_stop_tokens() -> None:
    good, bad = encoded(1, 2, 3, 4, labelled=2), encoded(1, 2, 5, labelled=1)
    assert make_pair(good, bad, 4) == [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}]
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3, 4], "label": True},
        {"prompt_ids": [1, 2], "completion_ids": [5], "label": False},
    ]
    assert make_answers(good, bad, 4) == rows
    assert make_answers(None, bad, 4) == rows[1:]


def test_what_is_no_pair_is_left_out_with_the_reason() -> None:
    good, bad = encoded(1, 2, 3, labelled=1), encoded(1, 7, 3, labelled=1)
    reasons = [
        make_pair(good, None, 9),
        make_pair(good, bad, 9),
        make_pair(good, encoded(1, 2, 5, 6, labelled=2), 3),
        make_pair(good, Fault("template_fails", "no"), 9),
    ]
    assert [str(reason).partition(";")[0] for reason in reasons] == [
        *("unpaired", "template_changes_turns", "over_length", "template_fails")
    ]


def test_earlier_answers_belong_to_the_prompt(in_tmp: Path) -> None:
    encoder = load_encoder(make_byte_base(in_tmp / "base"))
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "And?")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    rows = [
        comparison(0, prompt=prompt),
        comparison(1, rejected=None),
        comparison(2, "validation"),
        comparison(3, "test"),
    ]
    write_rows(Path("preferences.parquet"), rows, PLACED_PREFERENCES)
    found = read_comparisons(Path("preferences.parquet"), encoder, "train", "dpo", 1000)
    (row,) = found.rows
    decode = encoder.tokenizer.decode
    assert "Ho" in decode(row["prompt_ids"])
    assert "And?" in decode(row["prompt_ids"])
    assert decode(row["chosen_ids"]).startswith("It is the number 0.")
    assert found.drops.by_reason() == {"unpaired": 1}
    assert found.lengths == [
        [len(row["prompt_ids"]) + len(row[key]) for key in ("chosen_ids", "rejected_ids")]
    ]
    answers = read_comparisons(Path("preferences.parquet"), encoder, "train", "kto", 1000)
    assert [(one["row"], one["label"]) for one in answers.rows] == [(0, True), (1, False), (2, True)]
    assert answers.drops.by_reason() == {}


@pytest.mark.parametrize("side", ["train", "test"])
def test_an_empty_side_has_no_rows(in_tmp: Path, side: str) -> None:
    encoder = load_encoder(make_byte_base(in_tmp / "base"))
    write_rows(Path("preferences.parquet"), [comparison(2, "validation")], PLACED_PREFERENCES)
    assert read_comparisons(Path("preferences.parquet"), encoder, side, "dpo", 1000).rows == []
