"""Scores of generated answers against references."""

import pytest

from tasks.evaluate.texts import compare


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [("the  Gold!", ["gold"], 1.0), ("gold ore", ["gold"], 0.0), ("tin", ["gold", "Tin"], 1.0)],
)
def test_an_exact_match_ignores_case_articles_and_punctuation(
    answer: str, references: list[str], score: float
) -> None:
    assert compare("exact_match", answer, references) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("It is Au.", 1.0), ("(Au)", 1.0), ("Aurum", 0.0), ("It is au.", 0.0), ("", 0.0)],
)
def test_contains_matches_whole_words_and_case(answer: str, score: float) -> None:
    assert compare("contains", answer, ["Au"]) == score


def test_an_answer_of_articles_or_signs_only_is_not_equal_to_an_empty_one() -> None:
    # SQuAD's normalisation leaves nothing of the choices A and +.
    assert compare("exact_match", "a.", ["A"]) == 1
    assert [compare("exact_match", one, ["A"]) for one in ("", "The", "B", "...")] == [0, 0, 0, 0]
    assert [compare("exact_match", one, ["+"]) for one in ("+", "-", "")] == [1, 0, 0]


def test_token_f1_counts_each_shared_word_once() -> None:
    # Two of three words are right, and both reference words are found: 2 * (2/3 * 1) / (2/3 + 1).
    assert compare("token_f1", "in London England", ["London, England"]) == pytest.approx(0.8)
    assert compare("token_f1", "gold gold", ["gold"]) == pytest.approx(2 / 3)
    assert compare("token_f1", "", ["gold"]) == 0
    assert compare("token_f1", "...", ["The"]) == 1


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Four words match in order, of seven generated and six expected: precision 4/7, recall 4/6.
    score = compare("rouge_l", "the cat was found under the bed", ["the cat sat under a bed"])
    assert score == pytest.approx(2 * 4 / (7 + 6))
