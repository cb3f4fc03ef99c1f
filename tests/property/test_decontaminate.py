"""Properties of decontamination: the index finds the same hits as an exhaustive search."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.data.benchmarks import Question
from nightshift.data.text import shingles
from tasks.decontaminate import DecontaminateParams
from tasks.decontaminate.index import build_index
from tests.helpers.questions import hits_of, with_forms

PARAMS = DecontaminateParams(ngram_size=6, min_question_words=3, max_containment=0.7, max_drop_rate=1.0)
TEXTS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12).map(" ".join)


def is_hit(text: str, questions: list[str]) -> bool:
    """Return whether the text hits any question, by definition."""
    words = text.split()
    for question in questions:
        asked = question.split()
        if question == text:
            return True
        if len(asked) < 3:
            continue
        runs = [asked[i : i + 6] for i in range(len(asked) - 5)]
        if any(words[i : i + 6] in runs for i in range(len(words) - 5)):
            return True
        needed = shingles(asked, 3)
        if len(needed & shingles(words, 3)) / len(needed) >= 0.7:
            return True
    return False


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=6))
def test_the_index_finds_the_same_hits_as_an_exhaustive_search(text: str, questions: list[str]) -> None:
    items = [Question("b", str(i), question) for i, question in enumerate(questions)]
    index = build_index(with_forms(items), PARAMS, is_test=False)
    nothing = build_index([], PARAMS, is_test=True)
    assert bool(hits_of([row(text)], index, nothing, PARAMS)) == is_hit(text, questions)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=20), st.lists(TEXTS, max_size=6), st.booleans(), st.integers(1, 8))
def test_the_hits_do_not_depend_on_the_batches(
    texts: list[str],
    questions: list[str],
    is_test: bool,  # noqa: FBT001 - drawn
    batch: int,
) -> None:
    items = [Question("b", str(i), question) for i, question in enumerate(questions)]
    indexes = [build_index(with_forms(some), PARAMS, is_test=is_test) for some in (items, [])]
    benchmarks, test = reversed(indexes) if is_test else indexes
    rows = [row(text, number) for number, text in enumerate(texts)]
    in_batches = hits_of(rows, benchmarks, test, PARAMS, batch=batch)
    assert in_batches == hits_of(rows, benchmarks, test, PARAMS)
    assert [*in_batches] == sorted(in_batches, key=int)


def row(text: str, number: int = 0) -> dict[str, Any]:
    return {
        "id": str(number),
        "origin": f"s/000001.jsonl:{number}",
        "source": "s",
        "parent_id": None,
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}],
    }
