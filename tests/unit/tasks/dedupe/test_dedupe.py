"""Duplicates: which texts are removed, which are kept, and why."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from nightshift.data.text import canonical_messages
from tasks.dedupe import DedupeParams, signatures
from tasks.dedupe.__main__ import find_duplicates, find_label_conflicts
from tasks.dedupe.candidates import Removal, Text
from tasks.dedupe.rows import join_turns
from tasks.dedupe.signatures import open_memo

PARAMS = DedupeParams(
    num_perm=128, bands=16, rows_per_band=8, shingle_size=3, jaccard_threshold=0.8, seed=1, max_drop_rate=1.0
)
WORDS = [f"w{i}" for i in range(60)]
TEXT = " ".join(WORDS)
NEAR = " ".join([*WORDS[:59], "other"])
FAR = " ".join(f"v{i}" for i in range(60))


@pytest.fixture(autouse=True)
def _own_state(in_tmp: Path) -> None:
    """Give each test its own memo."""


def duplicates(texts: Sequence[str | Text], params: DedupeParams = PARAMS) -> dict[int, Removal]:
    with open_memo(params) as memo:
        return find_duplicates([Text("", t) if isinstance(t, str) else t for t in texts], params, memo)


def test_the_first_of_equal_texts_is_kept() -> None:
    assert duplicates([TEXT, FAR, TEXT]) == {2: Removal(0, 1.0, "normalized_duplicate", (0,))}


def test_a_near_duplicate_is_removed_with_its_exact_similarity() -> None:
    # Each text has 58 shingles and 57 are shared: 57 / 59.
    assert duplicates([TEXT, NEAR]) == {1: Removal(0, 57 / 59, "near_duplicate", (0,))}


def test_a_copy_of_a_removed_text_is_removed_for_the_same_reason() -> None:
    removal = Removal(0, 57 / 59, "near_duplicate", (0,))
    assert duplicates([TEXT, NEAR, NEAR]) == {1: removal, 2: removal}


def test_a_text_that_is_only_near_a_removed_text_is_kept() -> None:
    # B is near A; C is near B but not A. Keep-first compares with survivors only.
    a = WORDS
    b = [*WORDS[:54], *(f"b{i}" for i in range(6))]
    c = [*WORDS[:48], *(f"c{i}" for i in range(6)), *(f"b{i}" for i in range(6))]
    removed = duplicates([" ".join(t) for t in (a, b, c)])
    assert removed == {1: Removal(0, 52 / 64, "near_duplicate", (0,))}


def test_a_text_near_two_survivors_lists_both() -> None:
    # TEXT has similarity 58/61 to both others, which have 58/64 to each other.
    left, right = ["l"] * 4 + WORDS, WORDS + ["r"] * 4
    params = PARAMS.model_copy(update={"jaccard_threshold": 0.93})
    removed = duplicates([" ".join(left), " ".join(right), TEXT], params)
    assert {i: removal.near for i, removal in removed.items()} == {2: (0, 1)}


def test_short_texts_are_compared_by_characters() -> None:
    # 5 of the 61 5-grams of 65 characters contain the removed letter. By words, 3 of 5 shingles differ.
    british = "internationally recognised colours of photographic silver halides"
    removed = duplicates([british, british.replace("ou", "o")])
    assert {i: removal.jaccard for i, removal in removed.items()} == {1: 56 / 65}


def test_the_same_prompt_with_another_answer_is_a_conflict_and_is_kept() -> None:
    texts = [
        Text(f"user {TEXT}", "assistant yes"),
        Text(f"user {TEXT}", "assistant no"),
        Text(f"user {NEAR}", "assistant yes"),
    ]
    removed = duplicates(texts)
    assert {i: removal.kept for i, removal in removed.items()} == {2: 0}
    assert find_label_conflicts(texts, removed) == [[0, 1]]


def test_no_texts_have_no_duplicates() -> None:
    assert duplicates([]) == {}


def test_a_second_run_computes_no_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = duplicates([TEXT, FAR, NEAR])
    signed: list[str] = []
    minhash = signatures._minhash

    def note(texts: list[str], ngram_size: int, params: DedupeParams) -> object:
        signed.extend(texts)
        return minhash(texts, ngram_size, params)

    monkeypatch.setattr(signatures, "_minhash", note)
    assert duplicates([TEXT, FAR, NEAR]) == expected
    assert signed == []
    assert list(duplicates([TEXT, "one new text of more than eight words, all its own", FAR])) == []
    assert signed == ["one new text of more than eight words, all its own"]


def test_another_seed_recomputes_all_signatures_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    duplicates([TEXT, NEAR])
    assert list(duplicates([TEXT, NEAR], PARAMS.model_copy(update={"seed": 2}))) == [1]
    assert "seed was 1, is 2" in caplog.text


def test_the_last_answer_is_separated_from_the_prompt() -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Me."),
        ("user", "When?"),
        ("assistant", "Now."),
    ]
    texts = [canonical_messages([{"role": role, "content": content}]) for role, content in turns]
    assert join_turns(texts) == Text("system be brief user who assistant me user when", "assistant now")
    assert join_turns(["text a text"]) == Text("", "text a text")
