"""Duplicates: what goes, what stays, and why."""

from tasks.dedupe import DedupeParams, Removal, find_duplicates

PARAMS = DedupeParams(num_perm=128, bands=16, rows_per_band=8, shingle_size=3, jaccard_threshold=0.8, seed=1)
WORDS = [f"w{i}" for i in range(60)]
TEXT = " ".join(WORDS)
NEAR = " ".join([*WORDS[:59], "other"])
FAR = " ".join(f"v{i}" for i in range(60))


def test_the_first_of_equal_texts_stays() -> None:
    assert find_duplicates([TEXT, FAR, TEXT], PARAMS) == {2: Removal(0, 1.0, "exact_duplicate")}


def test_a_near_duplicate_goes_with_its_exact_similarity() -> None:
    # 57 of 58 shingles are shared: 57 / 59.
    assert find_duplicates([TEXT, NEAR], PARAMS) == {1: Removal(0, 57 / 59, "near_duplicate")}


def test_a_text_that_only_resembles_a_removed_one_stays() -> None:
    # B is near A, and C is near B but not near A: keep-first compares with survivors only.
    a = WORDS
    b = [*WORDS[:54], *(f"b{i}" for i in range(6))]
    c = [*WORDS[:48], *(f"c{i}" for i in range(6)), *(f"b{i}" for i in range(6))]
    removed = find_duplicates([" ".join(t) for t in (a, b, c)], PARAMS)
    assert removed == {1: Removal(0, 52 / 64, "near_duplicate")}


def test_no_text_is_no_duplicate() -> None:
    assert find_duplicates([], PARAMS) == {}
