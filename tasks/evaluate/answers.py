"""The benchmark `test_answers`: which answers in the test set are generated and compared. Needs no torch."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.core.files import iterate_rows, text_digest
from nightshift.data.encode import Encoder, Fault, Message, load_encoder, render
from tasks.evaluate import ExactMatchParams

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answers:
    """The test examples whose last answer is generated.

    Attributes:
        ids: Ids of the examples.
        max_new_tokens: Tokens of a generated answer, at most.
        counts: Number of test examples in and out, and left out by reason.
    """

    ids: list[str]
    max_new_tokens: int
    counts: dict[str, int]


def choose_answers(test: Path, base: Path, params: ExactMatchParams) -> Answers:
    """Choose the test examples whose last answer is short enough in tokens of the base, up to the limit.

    Args:
        test: Path of the test set.
        base: Folder of the base model, whose tokenizer counts for all models.
        params: Limits.
    """
    encoder = load_encoder(base)
    reasons = {
        row["id"]: find_reason(row, encoder, params.max_new_tokens)
        for row in iterate_rows(test, ["id", "messages", "tools"])
    }
    # In the order of a digest: a new example takes the place of at most one other.
    short = sorted((one for one, reason in reasons.items() if reason is None), key=text_digest)
    chosen = short[: params.limit]
    left_out = [reason for reason in reasons.values() if reason] + ["over_limit"] * (len(short) - len(chosen))
    counts = {reason: left_out.count(reason) for reason in sorted(set(left_out))}
    if not chosen:
        log.warning(
            "evaluate.exact_match: none of %d test examples can be asked (%s); raise max_new_tokens",
            len(reasons),
            ", ".join(f"{reason} {count}" for reason, count in counts.items()),
        )
    return Answers(chosen, params.max_new_tokens, {"test": len(reasons), "asked": len(chosen), **counts})


def find_reason(row: Mapping[str, Any], encoder: Encoder, max_tokens: int) -> str | None:
    """Return why an example cannot be asked; None if its last turn is a text answer that is short enough."""
    *before, last = row["messages"]
    if last["role"] != "assistant" or last["tool_calls"] or not last["content"].strip() or not before:
        return "no_text_answer"
    if last.get("train") is False:
        return "not_trained"
    tokens = encoder.tokenizer.encode(last["content"], add_special_tokens=False)
    return "too_long" if len(tokens.ids) > max_tokens else None


def render_prompt(messages: Sequence[Message], row: Mapping[str, Any], encoder: Encoder) -> str | None:
    """Render the text before the last answer as in training; None if the chat template fails.

    Args:
        messages: Turns, the answer last.
        row: Test example with the tools.
        encoder: Tokenizer and chat template of the model's base.
    """
    rendered = render(messages, row["tools"], encoder)
    if isinstance(rendered, Fault):
        return None
    last = rendered[-1]
    return last.text[: last.answers[-1][0]]
