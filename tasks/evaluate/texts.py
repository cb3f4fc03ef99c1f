"""Compare a generated answer with its references: 0 to 1, the best match counts."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from nightshift.data.benchmarks import Metric

WORD = re.compile(r"\w+")


def compare(metric: Metric, answer: str, references: Sequence[str]) -> float:
    """Return the score of an answer, 0 to 1.

    Example:
        >>> compare("exact_match", "The Answer.", ["answer", "reply"])
        1.0
        >>> compare("contains", "The symbol for gold is Au.", ["Au"]), compare("contains", "Aurum", ["Au"])
        (1.0, 0.0)
        >>> compare("token_f1", "Carl Scheele", ["Carl Wilhelm Scheele"])
        0.8
    """
    return max(METRICS[metric](answer, reference) for reference in references)


def starts_with(answer: str, choices: Sequence[str], right: int) -> bool:
    """Return whether an answer starts with the words of the right choice, and with those of no longer one.

    Example:
        >>> starts_with("Au, of course", ["Ag", "Au"], 1), starts_with("Not Au", ["Ag", "Au"], 1)
        (True, False)
        >>> starts_with("New York", ["New", "New York"], 0), starts_with("A. Au", ["A", "B"], 0)
        (False, True)
    """
    words = WORD.findall(answer.lower())
    found = [
        one
        for one in (WORD.findall(choice.lower()) for choice in choices)
        if one and words[: len(one)] == one
    ]
    return max(found, key=len, default=None) == WORD.findall(choices[right].lower())


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 if the texts are equal up to case, articles and punctuation, else 0.0.

    Of a reference that consists of these only, such as the choice "A" or "+", they count.

    Example:
        >>> exact_match("a.", "A"), exact_match("", "A"), exact_match("-", "+")
        (1.0, 0.0, 0.0)
    """
    if normalised(reference):
        return float(normalised(answer) == normalised(reference))
    words, expected = (" ".join(WORD.findall(text.lower())) or text.strip() for text in (answer, reference))
    return float(words == expected)


def contains(answer: str, reference: str) -> float:
    """Return 1.0 if the answer contains the reference's words in sequence, case-sensitive, else 0.0."""
    words, expected = (f" {' '.join(WORD.findall(text))} " for text in (answer, reference))
    return float(expected in words)


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 score of the words (SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250)."""
    words, expected = normalised(answer).split(), normalised(reference).split()
    shared = sum((Counter(words) & Counter(expected)).values())
    if not words or not expected:
        return float(words == expected)
    return 2 * shared / (len(words) + len(expected))


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of stemmed words (Lin 2004), by `rouge_score`."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(reference, answer)["rougeL"].fmeasure)


def normalised(text: str) -> str:
    """Lowercase a text; remove punctuation, articles and extra spaces, as SQuAD's evaluation script."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


METRICS: dict[Metric, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}
