"""Replies of language models: the one interface of all backends, and the memo in front of them."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from nightshift.core.config import Count, StageParams
from nightshift.core.files import text_digest
from nightshift.core.memo import Memo

log = logging.getLogger(__name__)
# Turns: role and content of each.
Prompt = list[dict[str, str]]


class EndpointParams(StageParams):
    """An OpenAI-compatible server, and how hard it may be used.

    Attributes:
        base_url: Address of the API, with /v1.
        api_key_env: Environment variable that holds the key; null for a server without one.
        max_concurrency: Requests under way at the same time.
        requests_per_minute: Requests started in a minute, at most.
        tokens_per_minute: Tokens asked for in a minute, at most.
        timeout_seconds: Longest wait for one answer.
        max_retries: Further attempts after 429, 5xx, time-outs and lost connections.
        max_total_tokens: Tokens that one run may use; then it stops asking.
    """

    base_url: str
    api_key_env: str | None
    max_concurrency: Count
    requests_per_minute: Count
    tokens_per_minute: Count
    timeout_seconds: Annotated[float, Field(gt=0)]
    max_retries: Annotated[int, Field(strict=True, ge=0, le=10)]
    max_total_tokens: Count


@dataclass(frozen=True, slots=True)
class Request:
    """One call.

    Attributes:
        prompt: What is asked.
        answers: How many answers to it.
        ordinal: Number of the call for its example: the same prompt asked again is another call.
    """

    prompt: Prompt
    answers: int
    ordinal: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, as it came, and the tokens that it took."""

    texts: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why nothing came back. It is never kept: the next run asks again."""

    reason: str


Result = Reply | Failure
OnReply = Callable[[int, Reply], None]
# A backend answers requests, in order, and reports each reply as soon as it has it.
Generate = Callable[[Sequence[Request], OnReply], list[Result]]


def open_memo() -> Memo:
    """Open the memo of raw replies. All that a reply depends on stands in the key."""
    return Memo("replies", {"schema": 1})


def ask(requests: Sequence[Request], model: str, generate: Generate, memo: Memo) -> list[Result]:
    """Answer requests from the memo, and the rest by the backend.

    A reply is kept as soon as it comes, so a run that is killed has paid for nothing twice. What the
    quality gate thinks of it is not kept: the gate may change.

    Args:
        requests: What to ask.
        model: Backend, model, revision and sampling, as one text.
        generate: The backend.
        memo: From `open_memo`.
    """
    keys = [request_key(request, model) for request in requests]
    known = {key: _from_bytes(value) for key, value in memo.read(list(dict.fromkeys(keys))).items()}
    new = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
    names = list(new)
    results: dict[str, Result] = {**known}
    if new:
        replies = generate(
            list(new.values()), lambda number, reply: memo.write([(names[number], _to_bytes(reply))])
        )
        results |= zip(names, replies, strict=True)
    log.info("%d of %d replies were known, %d asked for", len(requests) - len(new), len(requests), len(new))
    return [results[key] for key in keys]


def request_key(request: Request, model: str) -> str:
    """Key of a request in the memo; also the seed of its sampling."""
    numbers = f"{request.answers}/{request.ordinal}"
    return text_digest(model, json.dumps(request.prompt, sort_keys=True), numbers, size=16)


def _to_bytes(reply: Reply) -> bytes:
    return json.dumps(asdict(reply)).encode()


def _from_bytes(value: bytes) -> Reply:
    fields = json.loads(value)
    return Reply(tuple(fields["texts"]), fields["tokens"])
