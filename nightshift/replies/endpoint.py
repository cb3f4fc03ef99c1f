"""Backend `openai`: async client of any compatible server (vLLM, `transformers serve`, Ollama)."""

import asyncio
import logging
import os
import random
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from aiolimiter import AsyncLimiter
from openai import AsyncOpenAI
from tqdm import tqdm

from nightshift.core.errors import ConfigError, PipelineError, StageError
from nightshift.replies import EndpointParams, Failure, OnReply, Reply, Request, Result

# Consecutive requests that fail after all retries before the server counts as down.
BREAKER = 5
# Wait before a retry, seconds: doubled each time, up to the maximum.
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
LONGEST_RETRY_AFTER = 300.0
# The server rejects the content of this request; other requests may succeed.
REFUSED = (400, 413, 422)
# Estimate of prompt tokens for rate limit and budget; high for English.
CHARACTERS_PER_TOKEN = 3
# Tokens that a chat template adds: markup, and often its own system turn.
TEMPLATE_TOKENS = 64
log = logging.getLogger(__name__)


class Endpoint:
    """A server, its limits, and the usage so far."""

    def __init__(self, model: str, sampling: Mapping[str, Any], params: EndpointParams, section: str) -> None:
        """Read the API key and set up the limits.

        Args:
            model: Name of the model on the server.
            sampling: temperature, top_p and max_new_tokens.
            params: Server and limits.
            section: Section of params.yaml that contains them.

        Raises:
            ConfigError: The environment variable of the API key is not set.
        """
        self._key = os.environ.get(params.api_key_env, "") if params.api_key_env else "none"
        if not self._key:
            raise ConfigError(
                f"params.yaml: {section}.endpoint.api_key_env is {params.api_key_env}, but this variable is "
                "not set; set it in the environment, or use null for a server without a key"
            )
        self._model, self._sampling, self._params, self._section = model, sampling, params, section
        # One event loop for all calls, so the limits apply across calls.
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._loop.close)
        self._running = asyncio.Semaphore(params.max_concurrency)
        # Evenly spaced, without a burst at the start.
        self._calls = AsyncLimiter(1, 60 / params.requests_per_minute)
        self._rate = AsyncLimiter(params.tokens_per_minute, 60)
        self._resume_at = 0.0
        self._tokens = 0
        self._reserved = 0
        self._failed_in_a_row = 0
        self._error: PipelineError | None = None
        self._retries: Counter[str] = Counter()

    def __call__(self, requests: Sequence[Request], on_reply: OnReply) -> list[Result]:
        """Send all requests; see `nightshift.replies.Generate`.

        Raises:
            StageError: The server is down.
            ConfigError: The server rejects the key or the model.
        """
        results = self._loop.run_until_complete(self._ask_all(requests, on_reply))
        if self._retries:
            log.warning("%s: retried: %s", self._params.base_url, dict(self._retries))
            self._retries.clear()
        if self._error:
            raise self._error
        reasons = [result.reason for result in results if isinstance(result, Failure)]
        if len(reasons) == len(results) and set(reasons) - {"budget_spent"}:
            raise self._server_down(f"none of {len(results)} requests was answered", reasons[-1])
        return results

    async def _ask_all(self, requests: Sequence[Request], on_reply: OnReply) -> list[Result]:
        """Send all requests within the limits; after an error, only let running (paid) ones finish."""
        params = self._params
        client = AsyncOpenAI(
            base_url=params.base_url, api_key=self._key, max_retries=0, timeout=params.timeout_seconds
        )
        with tqdm(total=len(requests), desc=self._section, unit="call", disable=None) as progress:

            async def send_one(number: int, request: Request) -> Result:
                async with self._running:
                    result = await self._ask_within_budget(client, request)
                if isinstance(result, Reply):
                    on_reply(number, result)
                progress.update()
                return result

            async with client:
                return await asyncio.gather(*(send_one(i, request) for i, request in enumerate(requests)))

    async def _ask_within_budget(self, client: AsyncOpenAI, request: Request) -> Result:
        """Send the request if the token budget allows it, and count the tokens used."""
        expected = self._expected_tokens(request)
        if self._error:
            return Failure("stopped")
        if self._tokens + self._reserved + expected > self._params.max_total_tokens:
            return Failure("budget_spent")
        self._reserved += expected
        try:
            result = await self._ask(client, request)
        except PipelineError as err:
            self._error = self._error or err
            return Failure("stopped")
        finally:
            self._reserved -= expected
        if isinstance(result, Reply):
            # A server that reports no usage is charged the estimate.
            self._tokens += result.tokens or expected
            self._failed_in_a_row = 0
        else:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= BREAKER:
                self._error = self._error or self._server_down(
                    f"{BREAKER} requests in a row failed", result.reason
                )
        return result

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Result:
        """Send a request, and retry after 429, 5xx, timeouts and lost connections.

        Raises:
            ConfigError: The server rejects the key or the model; a retry would not help.
        """
        reason = ""
        for attempt in range(self._params.max_retries + 1):
            await self._wait_for_turn(request)
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                result = await self._send(client, request)
                if isinstance(result, Reply) or result.reason == "truncated":
                    return result
                reason = result.reason
            except openai.APITimeoutError:
                reason = "timeout"
            except openai.APIConnectionError:
                reason = "connection_lost"
            except openai.APIStatusError as err:
                if err.status_code in REFUSED:
                    return Failure("refused")
                reason = self._status_reason(err)
                wait = self._hold_back(err, wait)
            except (openai.APIError, ValueError):
                reason = "malformed_response"
            self._retries[reason] += 1
            if attempt < self._params.max_retries:
                await asyncio.sleep(wait)
        return Failure(reason)

    async def _send(self, client: AsyncOpenAI, request: Any) -> Result:
        """Send a request once."""
        answer = await client.chat.completions.create(
            model=self._model,
            messages=request.prompt,
            temperature=self._sampling["temperature"],
            top_p=self._sampling["top_p"],
            max_tokens=self._sampling["max_new_tokens"],
        )
        return _read(answer)

    async def _wait_for_turn(self, request: Any) -> None:
        """Wait until the server accepts requests again and the rate limits allow one."""
        loop = asyncio.get_running_loop()
        while (wait := self._resume_at - loop.time()) > 0:
            await asyncio.sleep(wait)
        await self._calls.acquire()
        await self._rate.acquire(min(self._expected_tokens(request), self._params.tokens_per_minute))

    def _hold_back(self, err: openai.APIStatusError, wait: float) -> float:
        """Return the wait that the server asks for, if any; all other calls wait for it too."""
        requested = retry_after(err.response.headers)
        if requested is None:
            return wait
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + requested)
        return requested

    def _status_reason(self, err: openai.APIStatusError) -> str:
        """Return the reason for an HTTP status that is worth a retry.

        Raises:
            ConfigError: A retry would not help.
        """
        if err.status_code == 429:
            return "rate_limited"
        if err.status_code in (408, 409) or err.status_code >= 500:
            return "server_error"
        raise ConfigError(
            f"{self._section}.endpoint: {self._params.base_url} returned {err.status_code} for model "
            f"{self._model!r}; check the model's name, {self._section}.endpoint.base_url and the key"
        ) from err

    def _expected_tokens(self, request: Any) -> int:
        """Estimate the tokens of a call: the prompt and the longest answer."""
        characters = sum(len(message["content"]) for message in request.prompt)
        return int(characters // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS + self._sampling["max_new_tokens"])

    def _server_down(self, what: str, reason: str) -> StageError:
        """Build the error for a server that no longer answers."""
        return StageError(
            f"{self._section}: {self._params.base_url}: {what} ({reason}); check that the server is "
            "running. What is done is cached; the next run continues from there"
        )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the retry-after header in seconds (a number or a date, at most five minutes), or None.

    Example:
        >>> retry_after({"retry-after": "2.5"}), retry_after({}), retry_after({"retry-after": "soon"})
        (2.5, None, None)
        >>> retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})
        0.0
    """
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except ValueError:
            return None
    return min(LONGEST_RETRY_AFTER, max(0.0, seconds))


def _read(answer: Any) -> Result:
    """Read text and tokens of an answer; an empty or truncated answer is a failure."""
    choices = getattr(answer, "choices", None) or []
    if any(choice.finish_reason == "length" for choice in choices):
        return Failure("truncated")
    texts = tuple(choice.message.content for choice in choices if choice.message and choice.message.content)
    used = getattr(answer, "usage", None)
    return Reply(texts, int(used.total_tokens) if used else 0) if texts else Failure("empty_response")
