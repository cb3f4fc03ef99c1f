"""Run the stage: propose candidates, check them, write train with the accepted paraphrases."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from nightshift.core.config import load_params
from nightshift.core.errors import DataError
from nightshift.core.files import appended_rows, iterate_batches, text_digest, write_batches
from nightshift.core.paths import AUGMENTED_TRAIN, BASE, REJECTED, SIMILARITY, TRAIN
from nightshift.core.stage import run_main, write_summary
from nightshift.data.drops import FEWEST
from nightshift.data.schemas import AUGMENTED, MESSAGES, AugmentedExample, GroupedExample
from nightshift.replies import open_memo
from tasks.augment import AugmentParams, Style
from tasks.augment.meaning import load_embedder
from tasks.augment.prompts import SPEAKERS
from tasks.augment.propose import NO_RULE, CandidateRequest, Proposal, Propose, by_model, by_rules
from tasks.augment.quality import CompareMeaning, Messages, Scores, check_paraphrase

_SCORE_FIELDS = [
    pa.field("length_ratio", pa.float64()),
    pa.field("source_similarity", pa.float64()),
    pa.field("sibling_similarity", pa.float64()),
    pa.field("meaning_similarity", pa.float64()),
]
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("parent_id", pa.string()),
        pa.field("style", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("messages", MESSAGES),
        *_SCORE_FIELDS,
    ]
)
SCORES_SCHEMA = pa.schema([pa.field("id", pa.string()), *_SCORE_FIELDS])
# Further calls for missing paraphrases; their prompts list the rejected candidates.
REFILLS = 2


log = logging.getLogger(__name__)


@dataclass(slots=True)
class Work:
    """Paraphrases and rejected candidates of one example."""

    example: GroupedExample
    accepted: list[AugmentedExample] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    surplus: int = 0
    failure: str | None = None


@dataclass(slots=True)
class Tally:
    """Counts over all examples."""

    rows_in: int = 0
    added: int = 0
    wanted: int = 0
    tokens: int = 0
    surplus: int = 0
    styles: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    shortfall: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    accepted_by_source: Counter[str] = field(default_factory=Counter)
    rejected_by_source: Counter[str] = field(default_factory=Counter)
    unruly_by_source: Counter[str] = field(default_factory=Counter)


def main() -> None:
    """Write originals with their paraphrases, rejected candidates with reasons, and all scores."""
    params = load_params(AugmentParams, "augment")
    tally = Tally()
    with (
        ExitStack() as stack,
        appended_rows(REJECTED, REJECTED_SCHEMA) as log_rejected,
        appended_rows(SIMILARITY, SCORES_SCHEMA) as log_scores,
    ):
        propose = (
            by_rules
            if params.backend == "rules"
            else by_model(params, BASE, stack.enter_context(open_memo()))
        )
        compare = load_embedder(params.embedder) if params.embedder else None
        batches = augment(propose, params, compare, tally, (log_rejected, log_scores))
        write_batches(AUGMENTED_TRAIN, batches, AUGMENTED)
    require_rules(tally)
    require_acceptance(tally.accepted_by_source, tally.rejected_by_source, params.min_acceptance_rate)
    write_summary(
        "augment",
        rows_in=tally.rows_in,
        added=tally.added,
        rows_out=tally.rows_in + tally.added,
        wanted=tally.wanted,
        shortfall=dict(sorted(tally.shortfall.items())),
        rejected=dict(sorted(tally.rejected.items())),
        skipped=dict(sorted(tally.skipped.items())),
        surplus=tally.surplus,
        styles=dict(sorted(tally.styles.items())),
        tokens_generated=tally.tokens,
    )


def augment(
    propose: Propose,
    params: AugmentParams,
    compare: CompareMeaning | None,
    tally: Tally,
    logs: tuple[Callable[[list[dict[str, Any]]], None], Callable[[list[dict[str, Any]]], None]],
) -> Iterator[pa.RecordBatch]:
    """Yield batches of each original followed by its paraphrases; log rejected candidates and scores."""
    for batch in iterate_batches(TRAIN):
        tally.rows_in += batch.num_rows
        if set(params.sources).isdisjoint(batch["source"].unique().to_pylist()):
            added = [AUGMENTED.field(name) for name in AUGMENTED.names[len(batch.schema) :]]
            nulls = [pa.nulls(batch.num_rows, field.type) for field in added]
            yield pa.RecordBatch.from_arrays([*batch.columns, *nulls], schema=AUGMENTED)
            continue
        works = [Work(row) for row in batch.to_pylist()]
        selected = [work for work in works if _is_selected(work.example, params, tally)]
        paraphrase(selected, propose, params, compare, tally)
        rows: list[AugmentedExample] = []
        for work in works:
            rows.append({**work.example, "parent_id": None, "style": None, "ordinal": None})
            rows += work.accepted
        yield pa.RecordBatch.from_pylist(rows, schema=AUGMENTED)
        logs[0]([row for work in works for row in work.rejected])
        logs[1]([row for work in works for row in work.scores])


def paraphrase(
    works: Sequence[Work],
    propose: Propose,
    params: AugmentParams,
    compare: CompareMeaning | None,
    tally: Tally,
) -> None:
    """Paraphrase the examples: one call per style, and up to two refills for missing paraphrases."""
    wanted = params.paraphrases_per_example
    rounds = 1 if params.backend == "rules" else 1 + REFILLS
    for number in range(rounds):
        short = [work for work in works if len(work.accepted) < wanted and work.failure is None]
        if not short:
            break
        calls = [(work, call) for work in short for call in _plan_calls(work, number, params)]
        proposals = propose([call for _, call in calls])
        for (work, call), proposal in zip(calls, proposals, strict=True):
            accept_candidates(work, call, proposal, params, compare)
            tally.tokens += proposal.tokens
    for work in works:
        tally.wanted += wanted
        tally.added += len(work.accepted)
        tally.surplus += work.surplus
        tally.styles.update(str(row["style"]) for row in work.accepted)
        tally.rejected.update(row["reason"] for row in work.rejected)
        tally.accepted_by_source[work.example["source"]] += len(work.accepted)
        tally.rejected_by_source[work.example["source"]] += len(work.rejected)
        tally.unruly_by_source[work.example["source"]] += work.failure == NO_RULE
        if missing := wanted - len(work.accepted):
            tally.shortfall[work.failure or "rejected"] += missing


def accept_candidates(
    work: Work,
    call: CandidateRequest,
    proposal: Proposal,
    params: AugmentParams,
    compare: CompareMeaning | None,
) -> None:
    """Check the candidates of one call; accept as many as are missing."""
    example = work.example
    work.failure = work.failure or proposal.failure
    for _ in range(proposal.unreadable):
        work.rejected.append(_rejected(example, call.style, "malformed_reply", [], Scores()))
    for texts in proposal.versions:
        if len(work.accepted) == params.paraphrases_per_example:
            work.surplus += 1
            continue
        messages = _replace_texts(example["messages"], texts)
        siblings = [_paraphrased_turns(row["messages"]) for row in work.accepted]
        reason, scores = check_paraphrase(
            call.turns, _paraphrased_turns(messages), call.style, siblings, params, compare
        )
        if reason:
            work.rejected.append(_rejected(example, call.style, reason, messages, scores))
            continue
        ordinal = len(work.accepted) + 1
        id_ = text_digest(example["id"], str(ordinal))
        work.accepted.append(
            {
                **example,
                "id": id_,
                "messages": messages,
                "parent_id": example["id"],
                "style": call.style,
                "ordinal": ordinal,
            }
        )
        work.scores.append({"id": id_, **asdict(scores)})


def choose_style(example_id: str, number: int, params: AugmentParams) -> Style:
    """Choose a style by the hash of the example id and the number of the paraphrase.

    The weights hold over many examples; an example keeps its styles whatever other data exists.
    """
    if params.backend == "rules":
        return "reword"
    digest = hashlib.blake2b(f"{params.seed}|{example_id}|{number}".encode(), digest_size=8).digest()
    styles = sorted(params.styles)
    weights = [params.styles[style] for style in styles]
    return random.Random(digest).choices(styles, weights)[0]


def require_rules(tally: Tally) -> None:
    """Warn of sources with examples that no rule fits, and fail if one has no other examples.

    Raises:
        DataError: No rule fits any example of a source.
    """
    for source, count in sorted((+tally.unruly_by_source).items()):
        others = tally.accepted_by_source[source] + tally.rejected_by_source[source]
        message = f"augment.backend=rules: no rule fits {count} examples of {source}"
        if not others:
            raise DataError(
                f"{TRAIN}: {message}, which are all of them; remove it from augment.sources, or set "
                "augment.backend to transformers or openai"
            )
        log.warning("%s; they have no paraphrase", message)


def require_acceptance(accepted: Counter[str], rejected: Counter[str], limit: float) -> None:
    """Fail if too few candidates pass, overall or in a source with enough rejected candidates.

    Args:
        accepted: Source -> number of accepted candidates.
        rejected: Source -> number of rejected candidates.
        limit: Lowest acceptance rate, 0 to 1.

    Raises:
        DataError: The acceptance rate is below `limit`.
    """
    found = [
        f"{accepted[source]} of {accepted[source] + count} paraphrases of {source}"
        for source, count in sorted(rejected.items())
        if count >= FEWEST and accepted[source] < limit * (accepted[source] + count)
    ]
    proposed = accepted.total() + rejected.total()
    if accepted.total() < limit * proposed:
        found.insert(0, f"{accepted.total()} of {proposed} paraphrases")
    if found:
        raise DataError(
            f"{REJECTED}: {', '.join(found)} passed the quality gate, less than "
            f"augment.min_acceptance_rate={limit}; see the reasons in this file, or choose other sources"
        )


def _is_selected(example: GroupedExample, params: AugmentParams, tally: Tally) -> bool:
    """Return whether an example is paraphrased; count the examples that cannot be."""
    if example["source"] not in params.sources or not params.paraphrases_per_example:
        return False
    # Tool calls and tool results are data, not wording.
    if any(turn["role"] == "tool" or turn["tool_calls"] for turn in example["messages"]):
        tally.skipped["tool_calls"] += 1
        return False
    # It leads to the answer as it is worded.
    if any(turn["reasoning"] for turn in example["messages"]):
        tally.skipped["reasoning"] += 1
        return False
    return True


def _plan_calls(work: Work, number: int, params: AugmentParams) -> list[CandidateRequest]:
    """Build the requests of one round, one per style that is due."""
    wanted = params.paraphrases_per_example
    numbers = range(number * wanted, number * wanted + wanted - len(work.accepted))
    styles = Counter(choose_style(work.example["id"], one, params) for one in numbers)
    turns = _paraphrased_turns(work.example["messages"])
    avoid = tuple(
        tuple(turn["content"] for turn in _paraphrased_turns(row["messages"]))
        for row in work.rejected
        if row["messages"]
    )
    return [
        CandidateRequest(turns, style, count + params.over_generation, avoid, number)
        for style, count in sorted(styles.items())
    ]


def _paraphrased_turns(messages: Messages) -> Messages:
    """Return the turns to paraphrase: all but the system turn."""
    return [turn for turn in messages if turn["role"] in SPEAKERS]


def _replace_texts(messages: Messages, texts: Sequence[str]) -> Messages:
    """Replace the texts of the paraphrased turns; a system turn stays unchanged."""
    remaining = iter(texts)
    return [{**turn, "content": next(remaining)} if turn["role"] in SPEAKERS else turn for turn in messages]


def _rejected(
    example: GroupedExample, style: Style, reason: str, messages: Messages, scores: Scores
) -> dict[str, Any]:
    """Build the log row of a rejected candidate."""
    return {
        "parent_id": example["id"],
        "style": style,
        "reason": reason,
        "messages": messages,
        **asdict(scores),
    }


if __name__ == "__main__":
    run_main(main, has_many_objects=True)
