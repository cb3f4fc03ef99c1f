"""Laws of deduplication."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.dedupe import DedupeParams, find_duplicates
from tasks.text import jaccard, shingles

PARAMS = DedupeParams(num_perm=32, bands=16, rows_per_band=2, shingle_size=2, jaccard_threshold=0.7, seed=1)
TEXTS = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join), max_size=12)


@settings(max_examples=40, deadline=None)
@given(TEXTS)
def test_dedupe_is_idempotent_and_never_removes_without_a_survivor(texts: list[str]) -> None:
    removals = find_duplicates(texts, PARAMS)
    survivors = [text for i, text in enumerate(texts) if i not in removals]
    assert find_duplicates(survivors, PARAMS) == {}
    for i, removal in removals.items():
        assert removal.kept < i
        assert removal.kept not in removals
        similarity = jaccard(shingles(texts[i], 2), shingles(texts[removal.kept], 2))
        assert removal.jaccard == similarity >= 0.7


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS)
def test_new_texts_never_change_what_happened_to_old_ones(old: list[str], new: list[str]) -> None:
    before = find_duplicates(old, PARAMS)
    after = find_duplicates(old + new, PARAMS)
    assert {i: removal for i, removal in after.items() if i < len(old)} == before
