"""Replies from language models: one interface for all backends, and the cache in front of them."""

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
# Turns, each with role and content.
Prompt = list[dict[str, str]]


class EndpointParams(StageParams):
    """OpenAI-compatible server and its usage limits.

    Attributes:
        base_url: URL of the API, including /v1.
        api_key_env: Environment variable with the API key; null for a server without a key.
        max_concurrency: Maximum number of concurrent requests.
        requests_per_minute: Maximum number of requests started per minute.
        tokens_per_minute: Maximum number of tokens requested per minute.
        timeout_seconds: Timeout of one request, seconds.
        max_retries: Maximum retries after 429, 5xx, timeouts and lost connections.
        max_total_tokens: Token budget of one run; no request is sent beyond it.
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
        prompt: Turns to send.
        answers: Number of answers.
        ordinal: Number of the call for its example: the same prompt with another number is another call.
    """

    prompt: Prompt
    answers: int
    ordinal: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Raw reply texts, and the number of tokens used."""

    texts: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason why there is no reply. It is never cached: the next run asks again."""

    reason: str


Result = Reply | Failure
OnReply = Callable[[int, Reply], None]
# A backend returns results in request order, and reports each reply as soon as it arrives.
Generate = Callable[[Sequence[Request], OnReply], list[Result]]


def open_memo() -> Memo:
    """Open the cache of raw replies. The key contains everything that a reply depends on."""
    return Memo("replies", {"schema": 1})


def ask(requests: Sequence[Request], model: str, generate: Generate, memo: Memo) -> list[Result]:
    """Answer requests from the cache, and the rest with the backend.

    Each reply is cached as soon as it arrives, so a killed run pays for nothing twice. The verdict of
    the quality gate is not cached: the gate may change.

    Args:
        requests: Requests to answer.
        model: Backend, model, revision and sampling, as one string.
        generate: Backend.
        memo: Cache from `open_memo`.
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
    log.info("%d of %d replies from cache, %d requested", len(requests) - len(new), len(requests), len(new))
    return [results[key] for key in keys]


def request_key(request: Request, model: str) -> str:
    """Return the cache key of a request, which is also the seed of its sampling."""
    numbers = f"{request.answers}/{request.ordinal}"
    return text_digest(model, json.dumps(request.prompt, sort_keys=True), numbers, size=16)


def _to_bytes(reply: Reply) -> bytes:
    return json.dumps(asdict(reply)).encode()


def _from_bytes(value: bytes) -> Reply:
    fields = json.loads(value)
    return Reply(tuple(fields["texts"]), fields["tokens"])
