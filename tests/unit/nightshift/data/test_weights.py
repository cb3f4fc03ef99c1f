"""Examples are repeated or left out as the weight of their source says."""

import pytest

from nightshift.data.weights import Weights, copies

KEYS = [str(i) for i in range(2000)]


@pytest.mark.parametrize(
    ("weight", "low", "high"), [(1.0, 2000, 2000), (2.0, 4000, 4000), (0.5, 940, 1060), (1.5, 2940, 3060)]
)
def test_the_copies_add_up_to_the_weight(weight: float, low: int, high: int) -> None:
    assert low <= sum(copies(weight, key) for key in KEYS) <= high


def test_a_higher_weight_keeps_the_examples_of_a_lower_one() -> None:
    for low, high in ((0.2, 0.5), (0.5, 1.5), (1.5, 1.7)):
        assert all(copies(low, key) <= copies(high, key) for key in KEYS)
    assert {copies(1.5, key) for key in KEYS} == {1, 2}


def test_each_copy_is_a_row_and_the_counts_balance() -> None:
    rows = [
        {"source": source, "group_id": f"g{i}", "ordinal": ordinal}
        for source in ("twice", "half", "once")
        for i in range(100)
        for ordinal in (None, 1)
    ]
    weights = Weights({"twice": 2.0, "half": 0.5})
    found = [row for _, row in weights.repeat(enumerate(rows))]
    assert [number for number, _ in weights.repeat(enumerate(rows[:2]))] == [0, 0, 1, 1]
    weights = Weights({"twice": 2.0, "half": 0.5})
    assert [row for _, row in weights.repeat(enumerate(rows))] == found
    assert found[:4] == [rows[0], rows[0], rows[1], rows[1]]
    assert weights.added == {"twice": 200, "half": 0, "once": 0}
    assert 70 <= weights.left_out["half"] <= 130
    assert len(found) == len(rows) + 200 - weights.left_out["half"]
    assert found[-200:] == rows[-200:]
    # A paraphrase is chosen separately from its original.
    kept = {(row["group_id"], row["ordinal"]) for row in found if row["source"] == "half"}
    assert len({group for group, _ in kept}) > weights.left_out["half"] / 2 + 10


def test_another_export_of_the_same_rows_chooses_the_same_examples() -> None:
    rows = [{"source": "half", "group_id": f"g{i}", "ordinal": None, "id": i} for i in range(100)]
    again = [{**row, "id": 1000 + i} for i, row in enumerate(reversed(rows))]
    chosen = [
        {row["group_id"] for _, row in Weights({"half": 0.5}).repeat(enumerate(some))}
        for some in (rows, again)
    ]
    assert chosen[0] == chosen[1]
