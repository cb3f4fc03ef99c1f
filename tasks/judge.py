"""Compare generated answers with an LLM judge: data/evaluate -> data/judge, for people to read.

A side effect after the gate, which never reads it, because judges are biased. Each pair of answers is
judged twice, in both orders, because judges have a position bias (Zheng et al., arXiv 2306.05685); only
an answer preferred both times counts as better.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

from nightshift.core.config import Count, StageParams, load_params
from nightshift.core.files import read_json, read_rows, write_json
from nightshift.core.paths import BENCHMARKS, GATE, JUDGED, SCORES
from nightshift.core.stage import run_main
from nightshift.data.benchmarks import read_benchmarks
from nightshift.data.schemas import Score
from nightshift.replies import EndpointParams, Failure, Request, Result, ask, open_memo

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}
INSTRUCTION = (
    "You compare two answers to a question. Prefer the one that is right; of two that are, the one that is "
    "more helpful and says no more than it should. Reply with one letter: A or B for the better answer, C if "
    "neither is."
)
LETTER = re.compile(r"\b([ABC])\b")
Verdict = Literal["better", "worse", "equal", "undecided", "unanswered"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
# Letter -> verdict on the candidate, with its answer in first and in second position.
FIRST: dict[str, Verdict] = {"A": "better", "B": "worse", "C": "equal"}
SECOND: dict[str, Verdict] = {"A": "worse", "B": "better", "C": "equal"}
log = logging.getLogger(__name__)


class JudgeParams(StageParams):
    """The judge model and its limits.

    Attributes:
        model: Name of the judge model on the server; None disables the judge.
        limit: Pairs of answers per benchmark, at most.
        endpoint: OpenAI-compatible server.
    """

    model: str | None
    limit: Count
    endpoint: EndpointParams


class Judgement(TypedDict):
    """Verdict on the candidate's answer to an item, next to the reference's."""

    benchmark: str
    item: str
    question: str
    candidate: str
    reference: str
    verdict: Verdict


def main() -> None:
    """Judge the answers on which the gate's two models differ, and write the verdicts."""
    params = load_params(JudgeParams, "judge")
    if params.model is None:
        log.info("judge.model is null: the judge is disabled")
        return
    gate = read_json(GATE)
    generated = {one.name for one in read_benchmarks(BENCHMARKS) if one.kind == "generation"}
    pairs = find_pairs(read_rows(SCORES), generated, gate["reference"], params.limit)
    judged = compare_answers(pairs, params)
    counts: dict[str, Counter[str]] = {name: Counter() for name in sorted(generated)}
    for row in judged:
        counts[row["benchmark"]][row["verdict"]] += 1
    write_json(
        JUDGED,
        {
            "model": params.model,
            "reference": gate["reference"],
            "candidate": gate["candidate"],
            "counts": {name: dict(sorted(count.items())) for name, count in counts.items()},
            "judged": judged,
        },
    )
    log.info("%s: the candidate against the %s: %s", params.model, gate["reference"], counts)


def find_pairs(
    rows: Sequence[Score], benchmarks: set[str], reference: str, limit: int
) -> list[tuple[Score, Score]]:
    """Pair the candidate's generated answers with the reference's, where both exist and differ.

    Args:
        rows: Scores of all models.
        benchmarks: Names of the generation benchmarks.
        reference: `champion` or `base`.
        limit: Pairs per benchmark, at most.
    """
    generated = [row for row in rows if row["benchmark"] in benchmarks and row["status"] == "ok"]
    references = {(row["benchmark"], row["item"]): row for row in generated if row["model"] == reference}
    found: list[tuple[Score, Score]] = []
    counts: Counter[str] = Counter()
    for row in sorted(generated, key=lambda one: (one["benchmark"], one["item"])):
        other = references.get((row["benchmark"], row["item"]))
        if row["model"] != "candidate" or other is None or row["answer"] == other["answer"]:
            continue
        counts[row["benchmark"]] += 1
        if counts[row["benchmark"]] <= limit:
            found.append((row, other))
    return found


def compare_answers(pairs: Sequence[tuple[Score, Score]], params: JudgeParams) -> list[Judgement]:
    """Judge each pair in both orders.

    Raises:
        StageError: The server is unreachable.
        ConfigError: The server rejects the key or the model.
    """
    if not pairs:
        return []
    from nightshift.replies.endpoint import Endpoint

    backend = Endpoint(str(params.model), SAMPLING, params.endpoint, "judge")
    requests = [
        build_request(candidate["question"], *answers)
        for candidate, reference in pairs
        for answers in (
            (candidate["answer"], reference["answer"]),
            (reference["answer"], candidate["answer"]),
        )
    ]
    with open_memo() as memo:
        name = json.dumps(["judge", params.endpoint.base_url, params.model, SAMPLING])
        letters = [read_letter(result) for result in ask(requests, name, backend, memo)]
    return [
        {
            "benchmark": candidate["benchmark"],
            "item": candidate["item"],
            "question": candidate["question"],
            "candidate": candidate["answer"],
            "reference": reference["answer"],
            "verdict": combine(first, second),
        }
        for (candidate, reference), first, second in zip(pairs, letters[::2], letters[1::2], strict=True)
    ]


def build_request(question: str, first: str, second: str) -> Request:
    """Build the request that asks which of two answers is better."""
    content = f"Question:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}"
    turns = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": content}]
    return Request(turns, answers=1, ordinal=0)


def read_letter(result: Result) -> str | None:
    """Return the first letter A, B or C in the judge's reply, or None."""
    if isinstance(result, Failure):
        return None
    found = LETTER.search(result.texts[0])
    return found[1] if found else None


def combine(first: str | None, second: str | None) -> Verdict:
    """Combine the letters of both orders into a verdict; the candidate's answer is A, then B.

    Example:
        >>> combine("A", "B"), combine("B", "A"), combine("A", "A"), combine("C", "C"), combine("A", None)
        ('better', 'worse', 'undecided', 'equal', 'unanswered')
    """
    if first is None or second is None:
        return "unanswered"
    return FIRST[first] if FIRST[first] == SECOND[second] else "undecided"


if __name__ == "__main__":
    run_main(main)
