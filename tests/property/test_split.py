"""Properties of the train, validation and test split."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nightshift.data.prompts import list_prompts
from nightshift.data.text import canonical_messages
from tasks.split import SplitParams, assign, connect, row_keys, split_of

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


@given(st.lists(st.lists(st.integers(0, 12).map(str), max_size=3), max_size=12))
def test_rows_are_in_one_component_exactly_if_a_chain_of_common_keys_connects_them(
    keys: list[list[str]],
) -> None:
    expected = list(range(len(keys)))
    for _ in keys:
        for i, one in enumerate(keys):
            for j, other in enumerate(keys):
                if set(one) & set(other):
                    expected[i] = expected[j] = min(expected[i], expected[j])
    assert connect(keys) == expected


@given(st.lists(st.lists(st.integers(0, 12).map(str), max_size=3), max_size=12), st.integers(0, 12))
def test_the_earliest_row_of_a_component_stays_unless_components_merge(
    keys: list[list[str]], cut: int
) -> None:
    before, after = connect(keys[:cut]), connect(keys)
    assert all(after[root] == after[row] for row, root in enumerate(before))
    assert all(new <= old for old, new in zip(before, after, strict=False))


WORDS = st.sampled_from(["red", "green", "blue", "grey"])
BAD_ONLY = st.tuples(WORDS, WORDS).map(lambda pair: {"prompt": " ".join(pair)})


@given(st.lists(BAD_ONLY, max_size=8), st.lists(st.tuples(WORDS, WORDS).map(" ".join), max_size=8))
def test_all_answers_to_one_prompt_are_on_one_side(bad: list[dict[str, str]], good: list[str]) -> None:
    def row(prompt: str, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        texts = [canonical_messages([turn]) for turn in turns]
        group = f"{prompt} {answer}"
        return {"source": "s", "group": None, "group_id": group, "prompts": list_prompts(turns, texts)}

    prompts = [*good, *(one["prompt"] for one in bad)]
    rows = [row(prompt, str(i)) for i, prompt in enumerate(prompts)]
    sides = assign(rows, connect(map(row_keys, rows)), PARAMS)
    by_prompt: dict[str, set[str]] = {}
    for prompt, side in zip(prompts, sides, strict=True):
        by_prompt.setdefault(prompt, set()).add(side)
    assert all(len(found) == 1 for found in by_prompt.values())
