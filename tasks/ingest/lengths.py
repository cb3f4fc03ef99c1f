"""Token count of each example, with the base model's chat template and tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nightshift.core.memo import Memo
from nightshift.core.workers import Work
from nightshift.data.encode import Conversation, Encoded, Encoder, Fault
from nightshift.data.tokens import encode_stream, open_memo
from nightshift.raw.faults import RowError
from tasks.ingest.rows import Measured, Outcome, Rules, Task, convert_row


def special_tokens(encoder: Encoder) -> list[str]:
    """Return the base model's special tokens, sorted."""
    tokens = encoder.tokenizer.get_added_tokens_decoder().values()
    return sorted(token.content for token in tokens if token.special)


@contextmanager
def start_conversion(
    rules: Rules, encoder: Encoder, max_tokens: int | None
) -> Iterator[Work[Task, Measured]]:
    """Open the cache of token ids, and yield a function that converts rows and counts their tokens.

    Args:
        rules: How the rows are checked and repaired.
        encoder: Tokenizer and chat template of the base model.
        max_tokens: Longest accepted example, in tokens; None for no limit.
    """
    with open_memo(encoder) as memo:
        yield lambda tasks: measure((convert_row(*task, rules) for task in tasks), encoder, memo, max_tokens)


def measure(
    outcomes: Iterable[Outcome], encoder: Encoder, memo: Memo, max_tokens: int | None
) -> Iterator[Measured]:
    """Encode the examples among the outcomes.

    Args:
        outcomes: Examples and faults.
        encoder: Tokenizer and chat template of the base model.
        memo: Cache of token ids.
        max_tokens: Longest accepted example, in tokens; None for no limit.

    Yields:
        Each outcome in order, with its token count, which is that of its longest sequence; 0 for a fault. An
        example that the template does not render, or that is too long, becomes a fault.
    """
    for outcome, encoded in encode_stream(map(_with_conversation, outcomes), encoder, memo):
        if encoded is None:
            yield outcome, 0
            continue
        fault, count = _check_length(encoded, max_tokens)
        yield (replace(outcome, result=fault) if fault else outcome), count


def describe(counts: Sequence[int]) -> dict[str, Any]:
    """Return total, minimum, median, 90th, 95th and 99th percentile and maximum of the token counts.

    Example:
        >>> describe([3, 1, 2])
        {'total': 6, 'min': 1, 'p50': 2, 'p90': 3, 'p95': 3, 'p99': 3, 'max': 3}
    """
    if not counts:
        return {"total": 0}
    ordered = sorted(counts)
    last = len(ordered) - 1
    percentiles = {f"p{p}": ordered[round(last * p / 100)] for p in (50, 90, 95, 99)}
    return {"total": sum(ordered), "min": ordered[0], **percentiles, "max": ordered[-1]}


def _with_conversation(outcome: Outcome) -> tuple[Outcome, Conversation | None]:
    """Return the outcome with its messages and tools; None for a fault."""
    example = outcome.result
    return outcome, (None if isinstance(example, RowError) else (example["messages"], example["tools"]))


def _check_length(encoded: list[Encoded] | Fault, max_tokens: int | None) -> tuple[RowError | None, int]:
    """Return the fault of an encoded example, or its token count."""
    if isinstance(encoded, Fault):
        return RowError(*encoded), 0
    count = max(len(one.input_ids) for one in encoded)
    if max_tokens is not None and count > max_tokens:
        return RowError("too_many_tokens", f"{count}, ingest.max_tokens={max_tokens}"), 0
    return None, count
