"""Properties of scoring."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluate.retrieval import build_index
from tasks.evaluate.texts import METRICS, compare

TEXTS = st.lists(st.sampled_from(["gold", "Au", "the", "tin", "is", "7.", "-"]), max_size=6).map(" ".join)
DOCUMENTS = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=8
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(METRICS)), TEXTS, st.lists(TEXTS, min_size=1, max_size=3), TEXTS)
def test_a_score_is_between_0_and_1_and_another_reference_never_lowers_it(
    metric: str, answer: str, references: list[str], other: str
) -> None:
    score = compare(metric, answer, references)  # type: ignore[arg-type]
    assert 0 <= score <= 1
    assert compare(metric, answer, [*references, other]) >= score  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.sampled_from("abcde"))
def test_retrieved_documents_contain_the_word_and_do_not_depend_on_earlier_queries(
    known: list[str], word: str
) -> None:
    find = build_index(known, 3)
    found = find(word)
    assert all(word in document.split() for document in found)
    assert len(found) == min(3, len({document for document in known if word in document.split()}))
    find("a b c")
    assert find(word) == found == build_index(known, 3)(word)
