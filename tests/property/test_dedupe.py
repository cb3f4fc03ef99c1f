"""Properties of deduplication."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.core.memo import Memo
from nightshift.data.text import comparable_shingles, jaccard
from tasks.dedupe import DedupeParams
from tasks.dedupe.__main__ import find_duplicates
from tasks.dedupe.candidates import Removal, Text

PARAMS = DedupeParams(
    num_perm=32, bands=16, rows_per_band=2, shingle_size=2, jaccard_threshold=0.7, seed=1, max_drop_rate=1.0
)
TEXTS = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join), max_size=12)


def duplicates(texts: list[str], memo: Memo) -> dict[int, Removal]:
    return find_duplicates([Text("", text) for text in texts], PARAMS, memo)


@settings(max_examples=40, deadline=None)
@given(TEXTS)
def test_dedupe_is_idempotent_and_never_removes_without_a_survivor(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, Memo("signatures", {}, Path(folder)) as memo:
        removals = duplicates(texts, memo)
        survivors = [text for i, text in enumerate(texts) if i not in removals]
        assert duplicates(survivors, memo) == {}
    assert len(survivors) + len(removals) == len(texts)
    for i, removal in removals.items():
        assert removal.kept < i
        assert removal.kept == removal.near[0]
        assert not removals.keys() & set(removal.near)
        similarity = jaccard(comparable_shingles(texts[i], 2), comparable_shingles(texts[removal.kept], 2))
        assert removal.jaccard == similarity >= 0.7


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS)
def test_new_texts_never_change_earlier_decisions(old: list[str], new: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, Memo("signatures", {}, Path(folder)) as memo:
        before = duplicates(old, memo)
        after = duplicates(old + new, memo)
    assert {i: removal for i, removal in after.items() if i < len(old)} == before


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_a_cache_filled_in_another_order_gives_the_same_removals(texts: list[str], random: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Memo("signatures", {}, Path(folder) / "a") as memo:
            expected = duplicates(texts, memo)
        with Memo("signatures", {}, Path(folder) / "b") as memo:
            shuffled = list(texts)
            random.shuffle(shuffled)  # type: ignore[attr-defined]
            duplicates(shuffled, memo)
            assert duplicates(texts, memo) == expected
