"""The backend `openai`: any compatible server (vLLM, `transformers serve`, Ollama), asynchronously."""

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import openai
from aiolimiter import AsyncLimiter
from openai import AsyncOpenAI
from tqdm import tqdm

from tasks.augment import EndpointParams
from tasks.augment.generate import Failure, OnReply, Reply, Request, Result
from tasks.errors import ConfigError, PipelineError, StageError

# Requests in a row that fail for good before the server counts as gone.
BREAKER = 5
# Waits between attempts, in seconds: doubled each time, at most this.
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
# Tokens of a prompt, from its characters: a low estimate for English, used for the rate only.
CHARACTERS_PER_TOKEN = 3
log = logging.getLogger(__name__)


class Endpoint:
    """A server, its limits, and what has been used of them."""

    def __init__(self, model: str, sampling: Mapping[str, Any], params: EndpointParams) -> None:
        """Prepare to ask.

        Args:
            model: Name that the server knows the model by.
            sampling: temperature, top_p and max_new_tokens.
            params: The server and its limits.

        Raises:
            ConfigError: The variable that should hold the key is not set.
        """
        self._key = os.environ.get(params.api_key_env, "") if params.api_key_env else "none"
        if not self._key:
            raise ConfigError(
                f"params.yaml: augment.endpoint.api_key_env names {params.api_key_env}, which is not set; "
                "set it in the environment, or null for a server without a key"
            )
        self._model, self._sampling, self._params = model, sampling, params
        self._tokens = 0
        self._failed_in_a_row = 0
        self._retries: Counter[str] = Counter()

    def __call__(self, requests: Sequence[Request], on_reply: OnReply) -> list[Result]:
        """Ask all requests; see `tasks.augment.generate.Generate`.

        Raises:
            StageError: The server is gone.
            ConfigError: The server refuses the requests.
        """
        results = asyncio.run(self._ask_all(requests, on_reply))
        if self._retries:
            log.warning("%s: asked again: %s", self._params.base_url, dict(self._retries))
        return results

    async def _ask_all(self, requests: Sequence[Request], on_reply: OnReply) -> list[Result]:
        """Ask all at once, within the limits; stop all when the server is gone."""
        params = self._params
        running = asyncio.Semaphore(params.max_concurrency)
        calls = AsyncLimiter(params.requests_per_minute, 60)
        tokens = AsyncLimiter(params.tokens_per_minute, 60)

        async def one(number: int, request: Request) -> Result:
            async with running:
                if self._tokens >= params.max_total_tokens:
                    return Failure("budget_spent")
                await calls.acquire()
                await tokens.acquire(min(self._expected_tokens(request), params.tokens_per_minute))
                result = await self._ask(client, request)
            if isinstance(result, Reply):
                on_reply(number, result)
            self._note(result)
            progress.update()
            return result

        client = AsyncOpenAI(
            base_url=params.base_url, api_key=self._key, max_retries=0, timeout=params.timeout_seconds
        )
        with tqdm(total=len(requests), desc="paraphrase", unit="call", disable=None) as progress:
            try:
                async with client, asyncio.TaskGroup() as group:
                    asked = [group.create_task(one(i, request)) for i, request in enumerate(requests)]
            except* PipelineError as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in asked]

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Result:
        """Ask once, and again after what may pass: 429, 5xx, time-outs, lost connections.

        Raises:
            ConfigError: The server refuses the request itself; asking again would not help.
        """
        reason = ""
        for attempt in range(self._params.max_retries + 1):
            wait = None
            try:
                answer = await client.chat.completions.create(
                    model=self._model,
                    messages=request.prompt,  # type: ignore[arg-type]
                    temperature=self._sampling["temperature"],
                    top_p=self._sampling["top_p"],
                    max_tokens=self._sampling["max_new_tokens"],
                )
                if reply := _read(answer):
                    return reply
                reason = "empty_response"
            except openai.APITimeoutError:
                reason = "timeout"
            except openai.APIConnectionError:
                reason = "connection_lost"
            except openai.APIStatusError as err:
                reason, wait = self._status_reason(err), retry_after(err.response.headers)
            except (openai.APIError, ValueError):
                reason = "malformed_response"
            self._retries[reason] += 1
            if attempt < self._params.max_retries:
                backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(backoff if wait is None else wait)
        return Failure(reason)

    def _status_reason(self, err: openai.APIStatusError) -> str:
        """Name a status that may pass.

        Raises:
            ConfigError: It will not pass.
        """
        if err.status_code == 429:
            return "rate_limited"
        if err.status_code in (408, 409) or err.status_code >= 500:
            return "server_error"
        raise ConfigError(
            f"augment.endpoint: {self._params.base_url} answers {err.status_code} for model {self._model!r}; "
            "check augment.model, augment.endpoint.base_url and the key"
        ) from err

    def _expected_tokens(self, request: Request) -> int:
        """Estimate the tokens of a call, for the rate."""
        characters = sum(len(message["content"]) for message in request.prompt)
        return int(characters // CHARACTERS_PER_TOKEN + self._sampling["max_new_tokens"])

    def _note(self, result: Result) -> None:
        """Count what was used.

        Raises:
            StageError: Too many requests in a row have failed for good: the server counts as gone.
        """
        if isinstance(result, Reply):
            self._tokens += result.tokens
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= BREAKER:
            raise StageError(
                f"augment: {BREAKER} requests in a row to {self._params.base_url} failed ({result.reason}); "
                "see that the server runs. Replies so far are kept: the next run goes on from them"
            )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, at most a minute, or None.

    Example:
        >>> retry_after({"retry-after": "2.5"}), retry_after({}), retry_after({"retry-after": "soon"})
        (2.5, None, None)
    """
    try:
        return min(LONGEST_WAIT, max(0.0, float(headers["retry-after"])))
    except (KeyError, ValueError):
        return None


def _read(answer: Any) -> Reply | None:
    """Read the texts and the tokens of an answer; None if there is no text."""
    choices = getattr(answer, "choices", None) or []
    texts = tuple(choice.message.content for choice in choices if choice.message and choice.message.content)
    used = getattr(answer, "usage", None)
    return Reply(texts, int(used.total_tokens) if used else 0) if texts else None
