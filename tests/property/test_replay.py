"""The choice of replayed examples: its share, its stability, and its independence of everything else."""

from math import sqrt
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nightshift.data.replay import Replay

SHARES = st.floats(0, 1)
NAMES = st.lists(st.text(max_size=8), unique=True, max_size=60)


def drawn(names: list[str], trained: set[str], share: float, seed: int = 0) -> list[str]:
    """Return the ids of the examples that are trained, in order."""
    rows: list[Any] = [{"id": name, "parent_id": None, "source": "s"} for name in names]
    return [row["id"] for _, row in Replay(share, seed, trained).draw(enumerate(rows))]


@given(SHARES, st.integers(0, 2**31), st.integers(0, 3000))
def test_the_share_is_kept_within_the_rounding_of_chance(share: float, seed: int, count: int) -> None:
    names = [f"{seed}-{number}" for number in range(count)]
    found = len(drawn(names, set(names), share, seed))
    assert abs(found - share * count) <= 6 * sqrt(share * (1 - share) * count) + 3


@given(NAMES, st.sets(st.text(max_size=8)), SHARES)
def test_every_new_example_is_trained_and_the_order_is_kept(
    names: list[str], trained: set[str], share: float
) -> None:
    found = drawn(names, trained, share)
    assert [name for name in names if name in found] == found
    assert {name for name in names if name not in trained} <= set(found)


@given(NAMES, NAMES, SHARES, st.randoms())
def test_neither_more_examples_nor_another_order_changes_the_choice(
    names: list[str], more: list[str], share: float, chance: Any
) -> None:
    before = set(drawn(names, set(names), share))
    both = list({*names, *more})
    chance.shuffle(both)
    assert before == set(drawn(both, set(both), share)) & set(names)


@given(NAMES, SHARES, SHARES)
def test_a_higher_share_keeps_the_examples_of_a_lower_one(names: list[str], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(drawn(names, set(names), low)) <= set(drawn(names, set(names), high))
