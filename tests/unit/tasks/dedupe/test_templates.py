"""Templates: passages that many prompts share, and what is a prompt's own."""

import numpy as np

from tasks.dedupe.templates import Templates, find_shared_keys

PREFIX = "you are a helpful assistant of the company"


def prompts(count: int) -> list[str]:
    return [f"{PREFIX} question number w{i} please" for i in range(count)]


def test_a_passage_of_more_than_ten_prompts_is_a_template() -> None:
    assert not Templates(prompts(10), 3)
    templates = Templates(prompts(11), 3)
    assert templates.own(f"{PREFIX} question number w99 please") == {
        "question number w99",
        "number w99 please",
    }
    assert templates.own(PREFIX) == frozenset()


def test_a_prompt_that_repeats_a_passage_counts_once() -> None:
    assert not Templates([" ".join([PREFIX] * 50)], 3)


def test_a_prompt_shorter_than_a_passage_is_one_passage() -> None:
    templates = Templates(["hello there"] * 11, 3)
    assert templates.own("hello there") == frozenset()
    assert templates.own("hello you") == {"hello you"}


def test_the_order_of_words_counts() -> None:
    templates = Templates(["a b c d"] * 11, 3)
    assert templates.own("c b a") == {"c b a"}


def test_no_prompts_have_no_templates() -> None:
    assert not Templates([], 3)


def test_a_key_of_more_than_ten_texts_is_shared() -> None:
    keys = np.arange(24, dtype=np.uint64).reshape(12, 2)
    keys[:11, 0] = 7
    assert find_shared_keys(keys).tolist() == [[True, False]] * 11 + [[False, False]]
