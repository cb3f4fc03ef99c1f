"""Ask another model which written answers are better: data/evaluate -> data/judge, for people to read.

A side effect after the gate, and never read by it: a judge has tastes of its own. Each pair of answers is
judged twice, in both orders, since judges prefer the first or the second (Zheng et al., arXiv 2306.05685);
only what is preferred both times counts as better.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

from nightshift.core.config import Count, StageParams, load_params
from nightshift.core.files import read_json, read_rows, write_json
from nightshift.core.paths import BENCHMARKS, GATE, JUDGED, SCORES
from nightshift.core.stage import run_main
from nightshift.data.benchmarks import read_benchmarks
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
# What a letter means for the candidate, when its answer stands first, and when it stands second.
FIRST: dict[str, Verdict] = {"A": "better", "B": "worse", "C": "equal"}
SECOND: dict[str, Verdict] = {"A": "worse", "B": "better", "C": "equal"}
Row = dict[str, Any]
log = logging.getLogger(__name__)


class JudgeParams(StageParams):
    """Who judges.

    Attributes:
        model: Name that the server knows the judge by; None asks nobody.
        limit: Pairs of answers of each benchmark, at most.
        endpoint: The server.
    """

    model: str | None
    limit: Count
    endpoint: EndpointParams


def main() -> None:
    """Judge the answers on which the gate's two models differ, and write what was found."""
    params = load_params(JudgeParams, "judge")
    if params.model is None:
        log.info("judge.model is null: nobody is asked")
        return
    gate = read_json(GATE)
    written = {one.name for one in read_benchmarks(BENCHMARKS) if one.kind == "generation"}
    pairs = find_pairs(read_rows(SCORES), written, gate["reference"], params.limit)
    judged = compare_answers(pairs, params)
    counts: dict[str, Counter[str]] = {name: Counter() for name in sorted(written)}
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
    rows: Sequence[Row], benchmarks: set[str], reference: str, limit: int
) -> list[tuple[Row, Row]]:
    """Pair the candidate's written answers with the reference's, where both answered and the answers differ.

    Args:
        rows: Scores of all models.
        benchmarks: Those whose answers are written.
        reference: champion or base.
        limit: Pairs of each benchmark, at most.
    """
    written = [row for row in rows if row["benchmark"] in benchmarks and row["status"] == "ok"]
    theirs = {(row["benchmark"], row["item"]): row for row in written if row["model"] == reference}
    found: list[tuple[Row, Row]] = []
    taken: Counter[str] = Counter()
    for row in sorted(written, key=lambda one: (one["benchmark"], one["item"])):
        other = theirs.get((row["benchmark"], row["item"]))
        if row["model"] != "candidate" or other is None or row["answer"] == other["answer"]:
            continue
        taken[row["benchmark"]] += 1
        if taken[row["benchmark"]] <= limit:
            found.append((row, other))
    return found


def compare_answers(pairs: Sequence[tuple[Row, Row]], params: JudgeParams) -> list[Row]:
    """Ask about each pair in both orders.

    Returns:
        benchmark, item, question, candidate, reference (their answers) and verdict of each.

    Raises:
        StageError: The server is gone.
        ConfigError: It refuses the key or the model.
    """
    if not pairs:
        return []
    from nightshift.replies.endpoint import Endpoint

    backend = Endpoint(str(params.model), SAMPLING, params.endpoint, "judge")
    requests = [
        build_request(ours["question"], *answers)
        for ours, theirs in pairs
        for answers in ((ours["answer"], theirs["answer"]), (theirs["answer"], ours["answer"]))
    ]
    with open_memo() as memo:
        name = json.dumps(["judge", params.endpoint.base_url, params.model, SAMPLING])
        letters = [read_letter(result) for result in ask(requests, name, backend, memo)]
    return [
        {
            "benchmark": ours["benchmark"],
            "item": ours["item"],
            "question": ours["question"],
            "candidate": ours["answer"],
            "reference": theirs["answer"],
            "verdict": combine(first, second),
        }
        for (ours, theirs), first, second in zip(pairs, letters[::2], letters[1::2], strict=True)
    ]


def build_request(question: str, first: str, second: str) -> Request:
    """Ask which of two answers is better."""
    asked = f"Question:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}"
    turns = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": asked}]
    return Request(turns, answers=1, ordinal=0)


def read_letter(result: Result) -> str | None:
    """Return A, B or C as the judge wrote it first, or None if it wrote none of them."""
    if isinstance(result, Failure):
        return None
    found = LETTER.search(result.texts[0])
    return found[1] if found else None


def combine(first: str | None, second: str | None) -> Verdict:
    """Return what two letters say together; in the second the candidate's answer stood behind the other.

    Example:
        >>> combine("A", "B"), combine("B", "A"), combine("A", "A"), combine("C", "C"), combine("A", None)
        ('better', 'worse', 'undecided', 'equal', 'unanswered')
    """
    if first is None or second is None:
        return "unanswered"
    return FIRST[first] if FIRST[first] == SECOND[second] else "undecided"


if __name__ == "__main__":
    run_main(main)
