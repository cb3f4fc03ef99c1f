"""Properties of the train, validation and test split."""

from hypothesis import given
from hypothesis import strategies as st

from tasks.split import SplitParams, split_of

PARAMS = SplitParams(validation_share=0.1, test_share=0.2, by_phrasing=[], seed=0)


@given(st.lists(st.text(min_size=1), unique=True, min_size=2))
def test_the_split_of_a_group_does_not_depend_on_the_others(groups: list[str]) -> None:
    together = {group: split_of(group, PARAMS) for group in groups}
    assert all(split_of(group, PARAMS) == at for group, at in reversed(together.items()))


def test_the_shares_are_met() -> None:
    splits = [split_of(f"group-{i}", PARAMS) for i in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.2) < 0.01
    assert abs(splits.count("validation") / 20_000 - 0.1) < 0.01


def test_a_larger_test_share_only_adds_groups_to_test() -> None:
    larger = SplitParams(validation_share=0.1, test_share=0.3, by_phrasing=[], seed=0)
    for i in range(2000):
        if split_of(f"group-{i}", PARAMS) == "test":
            assert split_of(f"group-{i}", larger) == "test"
