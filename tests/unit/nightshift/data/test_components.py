"""Rows with a key in common form components."""

from hypothesis import given
from hypothesis import strategies as st

from nightshift.data.components import connect

KEYS = st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=3), max_size=12)


@given(KEYS)
def test_two_rows_are_connected_exactly_if_a_chain_of_keys_leads_from_one_to_the_other(
    keys: list[list[str]],
) -> None:
    found = connect(keys)
    for start in range(len(keys)):
        reached, known = {start}, set(keys[start])
        while more := {i for i, of_row in enumerate(keys) if known & set(of_row)} - reached:
            reached |= more
            known |= {key for i in more for key in keys[i]}
        assert {i for i, component in enumerate(found) if component == found[start]} == reached
        assert found[start] == min(reached)
