"""Quality gate for paraphrases: no checkable content may change.

Checks run in order of cost and each reports its violation. A fluent paraphrase with a wrong year is
worse than none: in doubt, reject.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightshift.data.schemas import Message
from nightshift.data.text import canonical, comparable_shingles, jaccard
from tasks.augment import AugmentParams, Style
from tasks.augment.facts import find_changed_fact, read_facts
from tasks.augment.language import has_meta_text, language_differs
from tasks.augment.names import count_negations, names_differ, read_names

Messages = list[Message]
# Two texts -> cosine similarity of their embeddings.
CompareMeaning = Callable[[str, str], float]
LENGTH_RATIO = (0.5, 2.0)
SHINGLE_SIZE = 3
# In these styles the answer must keep its facts; a reversed relation moves them to the question.
ANSWER_STAYS: tuple[Style, ...] = ("reword", "question_answer", "context_shift")


@dataclass(frozen=True, slots=True)
class Scores:
    """Measurements of a candidate; None if an earlier check rejected it.

    Attributes:
        length_ratio: Characters of the candidate per character of the source.
        source_similarity: Shingle Jaccard similarity with the source, 0 to 1.
        sibling_similarity: Highest shingle Jaccard similarity with an accepted paraphrase, 0 to 1.
        meaning_similarity: Cosine similarity with the source, -1 to 1.
    """

    length_ratio: float | None = None
    source_similarity: float | None = None
    sibling_similarity: float | None = None
    meaning_similarity: float | None = None


def check_paraphrase(
    source: Messages,
    candidate: Messages,
    style: Style,
    siblings: Sequence[Messages],
    params: AugmentParams,
    compare_meaning: CompareMeaning | None = None,
) -> tuple[str | None, Scores]:
    """Return the first violation of a paraphrase, or None, and its measurements.

    Args:
        source: Turns to paraphrase.
        candidate: Paraphrase, with the same roles in the same order.
        style: Paraphrase style.
        siblings: Accepted paraphrases of the same source.
        params: Thresholds.
        compare_meaning: Similarity function of the embedder, if one is configured.
    """
    before, after = _text(source), _text(candidate)
    if not after.strip() or any(not turn["content"].strip() for turn in candidate):
        return "empty_turn", Scores()
    ratio = len(after) / len(before)
    scores = Scores(ratio)
    if reason := find_violation(source, candidate, style):
        return reason, scores
    similar, nearest = _similarities(source, candidate, siblings)
    scores = Scores(ratio, similar, nearest)
    if similar >= params.max_similarity:
        return "copy_of_source", scores
    if nearest is not None and nearest >= params.max_sibling_similarity:
        return "copy_of_sibling", scores
    if compare_meaning is not None:
        # Rounded, because the last bits differ between CPUs.
        meaning = round(compare_meaning(before, after), 4)
        scores = Scores(ratio, similar, nearest, meaning)
        if meaning < params.min_meaning_similarity:
            return "meaning_changed", scores
    return None, scores


def find_violation(source: Messages, candidate: Messages, style: Style) -> str | None:
    """Return the first change of form, facts, names or negations, or None.

    Example:
        >>> say = lambda text: [{"role": "assistant", "content": text}]
        >>> find_violation(say("Found in 1875 by Lecoq."), say("Lecoq found it in 1857."), "reword")
        'number_changed'
    """
    before, after = _text(source), _text(candidate)
    if not LENGTH_RATIO[0] <= len(after) / len(before) <= LENGTH_RATIO[1]:
        return "length_changed"
    if language_differs(before, after):
        return "language_changed"
    if has_meta_text(before, after):
        return "meta_text"
    known, found = read_facts(before), read_facts(after)
    if reason := find_changed_fact(known, found):
        return reason
    if names_differ(read_names(known.rest), read_names(found.rest)):
        return "name_changed"
    if count_negations(known.rest) != count_negations(found.rest):
        return "negation_changed"
    if style in ANSWER_STAYS and any(
        find_changed_fact(read_facts(old["content"]), read_facts(new["content"]))
        for old, new in zip(source, candidate, strict=True)
        if old["role"] == "assistant"
    ):
        return "answer_changed"
    return None


def _similarities(
    source: Messages, candidate: Messages, siblings: Sequence[Messages]
) -> tuple[float, float | None]:
    """Return the similarity with the source, and with the nearest sibling."""
    new = comparable_shingles(canonical(_text(candidate)), SHINGLE_SIZE)
    similar = [
        jaccard(new, comparable_shingles(canonical(_text(other)), SHINGLE_SIZE))
        for other in (source, *siblings)
    ]
    return similar[0], max(similar[1:], default=None)


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(turn["content"] for turn in messages)
