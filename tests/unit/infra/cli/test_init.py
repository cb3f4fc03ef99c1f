"""Values that `nightshift init` chooses."""

import json
import struct
from pathlib import Path

import pytest

from infra.cli.init import choose, choose_max_length, count_parameters, name_sources


def chosen(lengths: list[int], parameters: int = 135_000_000, context: int = 8192) -> dict[str, object]:
    return {one.key: one.value for one in choose(lengths, parameters, {"max_position_embeddings": context})}


def test_a_thousand_short_examples_get_short_rows_and_three_epochs() -> None:
    values = chosen([100] * 990 + [431] * 9)
    assert values == {
        "pack.max_length": 448,
        "split.test_share": 0.1,
        "split.validation_share": 0.05,
        "sft.num_train_epochs": 3,
        "sft.learning_rate": 1e-3,
        "sft.gradient_accumulation_steps": 1,
    }


def test_few_examples_leave_enough_for_a_verdict() -> None:
    values = chosen([100] * 300)
    assert (values["split.test_share"], values["split.validation_share"]) == (0.25, 0.07)
    values = chosen([100] * 60)
    assert (values["split.test_share"], values["split.validation_share"]) == (0.3, 0.15)


def test_many_examples_of_a_large_model_get_one_epoch_and_a_lower_rate() -> None:
    values = chosen([360] * 200_000, parameters=8_000_000_000)
    assert values["sft.num_train_epochs"] == 1
    assert values["sft.learning_rate"] == 2e-4
    assert values["sft.gradient_accumulation_steps"] == 16


def test_a_row_is_not_longer_than_the_context_of_the_model() -> None:
    values = chosen([100] * 90 + [3000] * 10, context=1024)
    assert values["pack.max_length"] == 1024
    # 30,000 of 39,000 tokens are lost.
    assert values["pack.max_lost_token_share"] == 1.0


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([64], 64), ([65], 128), ([1], 64), ([100] * 99 + [120], 128), ([100] * 1000 + [900], 128)],
)
def test_a_row_holds_all_but_one_percent_of_the_tokens(lengths: list[int], expected: int) -> None:
    assert choose_max_length(lengths, 4096) == expected


def test_sources_have_distinct_names() -> None:
    assert list(name_sources(["a/chats.jsonl", "b/chats.csv", "./Support 2026/", "s3://b/x.parquet"])) == [
        "chats",
        "chats_2",
        "support_2026",
        "x",
    ]


def test_weights_are_counted_in_the_headers(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(68))
    assert count_parameters(tmp_path) == 17
