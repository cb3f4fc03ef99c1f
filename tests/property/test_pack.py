"""Laws of packing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pack import pack


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40))
def test_pack_places_every_example_once_and_whole_and_never_overfills(lengths: list[int]) -> None:
    encoded = [
        {"input_ids": [1000 * i + t for t in range(n)], "labels": [i] * n} for i, n in enumerate(lengths)
    ]
    rows = pack(encoded, [str(i) for i in range(len(lengths))], max_length=16)
    placed = [name for row in rows for name in row["example_ids"]]
    assert sorted(placed, key=int) == [str(i) for i in range(len(lengths))]
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 16
        start = 0
        for name, length in zip(row["example_ids"], row["seq_lengths"], strict=True):
            assert row["input_ids"][start : start + length] == encoded[int(name)]["input_ids"]
            assert row["labels"][start] == -100
            start += length
    # Best fit: any two rows together exceed one row's capacity.
    sizes = sorted(len(row["input_ids"]) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 16
