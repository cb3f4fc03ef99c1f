"""Models behind an OpenAI-compatible server: scored and asked by /v1/completions with tokens as prompts.

Logits stay on the server. `echo` with `logprobs` returns the log-probability of each token of a prompt, from
which choices and held-out losses follow.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import openai
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from openai import AsyncOpenAI
from transformers import AutoConfig, GenerationConfig

from nightshift.core.errors import ConfigError, StageError
from nightshift.data.encode import IGNORED, Encoded
from nightshift.replies import EndpointParams, Failure, Reply, Result
from nightshift.replies.endpoint import Endpoint
from tasks.evaluate.asker import Answer, Asker, Find, Request, context_length
from tasks.evaluate.servers import ALLOW_ADAPTERS, authorization, read_server
from tasks.evaluate.vllm import start_vllm

# Requests that are collected before the next ones are sent, which bounds memory.
CHUNK = 1024
# Time that a server may take to load an adapter, seconds.
LOAD_SECONDS = 600
# Questions whose log-probabilities tell models apart.
PROBES = ("Who are you?", "What is gold made of?", "Write one sentence about the weather.")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A sequence of tokens for a model.

    Attributes:
        model: Name of the model on the server.
        tokens: The sequence.
        max_new_tokens: Tokens to generate after it; None to score the sequence itself.
    """

    model: str
    tokens: list[int]
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Scored(Reply):
    """Log-probabilities (nats) of the tokens of a sequence, from the second token on."""

    logprobs: tuple[float, ...]


class Completions(Endpoint):
    """A server that continues and scores tokens, within the limits of an endpoint."""

    def __init__(self, params: EndpointParams, model: str, generation: Mapping[str, Any]) -> None:
        """Read the API key and set up the limits.

        Args:
            params: Server and limits.
            model: Name of the base on the server.
            generation: Parameters of greedy generation, beside its length.
        """
        super().__init__(model, {}, params, "evaluate")
        self._generation = generation

    def ask(self, requests: Sequence[TokenRequest], on_reply: Callable[[], None] = lambda: None) -> list[Any]:
        """Return the replies to all requests, in their order.

        Raises:
            ConfigError: The server rejects the key or the model, or cannot score a sequence.
            StageError: The server is down, refuses a request, or the token budget is spent.
        """
        replies: list[Any] = []
        for part in chunks(requests):
            replies += self(part, lambda _number, _reply: on_reply())
        if reasons := [reply.reason for reply in replies if isinstance(reply, Failure)]:
            raise StageError(
                f"evaluate: {self._params.base_url}: {len(reasons)} of {len(replies)} requests failed "
                f"({', '.join(sorted(set(reasons)))}); look at the server's log, or raise the limits in "
                "evaluate.endpoint"
            )
        return replies

    async def _send(self, client: AsyncOpenAI, request: TokenRequest) -> Result:
        """Send a request once."""
        common: dict[str, Any] = {"model": request.model, "prompt": request.tokens, "temperature": 0}
        try:
            if request.max_new_tokens is not None:
                answer = await client.completions.create(
                    **common, max_tokens=request.max_new_tokens, extra_body=self._generation
                )
                return Reply((answer.choices[0].text,), answer.usage.total_tokens if answer.usage else 0)
            # A server need not accept max_tokens: 0. The last log-probability is that of the new token.
            answer = await client.completions.create(**common, max_tokens=1, echo=True, logprobs=1)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as err:
            raise StageError(
                f"evaluate: {self._params.base_url} refused a prompt of {len(request.tokens)} tokens for "
                f"{request.model}: {err.message}; it must accept tokens as prompts, as vLLM does"
            ) from err
        found = answer.choices[0].logprobs
        values = (found and found.token_logprobs) or []
        n_tokens = len(request.tokens)
        # One value may be that of the new token; more are tokens that the server added.
        if len(values) not in (n_tokens, n_tokens + 1) or any(one is None for one in values[1:n_tokens]):
            raise ConfigError(
                f"evaluate.endpoint: {self._params.base_url} returns {len(values)} log-probabilities for a "
                f"prompt of {n_tokens} tokens; choices and losses need `echo` with `logprobs` in "
                "/v1/completions, as in vLLM"
            )
        scores = tuple(float(one) for one in values[1:n_tokens] if one is not None)
        return Scored((), answer.usage.total_tokens if answer.usage else 0, scores)

    def _expected_tokens(self, request: TokenRequest) -> int:
        """Return the tokens of a call: the prompt and the longest answer."""
        return len(request.tokens) + (request.max_new_tokens or 1)


class Served(Asker):
    """A model on a server.

    lm-eval's own client of such servers renders and tokenizes prompts in another way than ours.
    """

    tok_encode = HFLM.tok_encode
    eot_token_id = HFLM.eot_token_id
    prefix_token_id = HFLM.prefix_token_id
    tokenizer_name = HFLM.tokenizer_name
    custom_prefix_token_id = None

    def __init__(
        self, server: Completions, name: str, tokenizer: Any, max_length: int, find: Find | None
    ) -> None:
        """Describe the model.

        Args:
            server: The server.
            name: Name of the model on the server.
            tokenizer: Tokenizer of the base model.
            max_length: Tokens of a sequence, at most.
            find: Function that retrieves the documents for a question; None disables retrieval.
        """
        super().__init__()
        self._server, self._name, self.tokenizer, self.max_length = server, name, tokenizer, max_length
        # A chat template writes the start token itself.
        self.add_bos_token = False if tokenizer.chat_template else None
        self.prepare(tokenizer, find)

    def score_continuations(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the log-likelihood (nats) of each continuation; whether it is the likeliest is not asked."""
        answers = []
        for part in chunks(requests):
            scores = self._score([[*prompt, *rest] for _, prompt, rest in part])
            answers += [
                (sum(one[len(prompt) - 1 :]), False) for one, (_, prompt, _) in zip(scores, part, strict=True)
            ]
        return answers

    def sequence_losses(self, sequences: Sequence[Encoded]) -> Iterator[float]:
        """Yield the summed negative log-likelihood (nats) of the labels of each sequence."""
        self.begin(len(sequences))
        for part in chunks(sequences):
            scores = self._score([one.input_ids.tolist() for one in part])
            for one, values in zip(part, scores, strict=True):
                labels = one.labels[1:].tolist()
                yield -sum(nats for nats, label in zip(values, labels, strict=True) if label != IGNORED)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002, FBT001, FBT002
        """Generate greedily until a token that ends an answer."""
        asked = [
            TokenRequest(self._name, self.tok_encode(prompt), options["max_gen_toks"])
            for prompt, options in (request.args for request in requests)
        ]
        replies = self._server.ask(asked, lambda: self.advance(1))
        texts = [reply.texts[0] for reply in replies]
        # The text has its special tokens, so that what follows the reasoning is found as in other engines.
        return [self.tok_decode(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: FBT001, FBT002
        """Raise NotImplementedError: no kind of benchmark needs it."""
        raise NotImplementedError

    def _score(self, sequences: Sequence[list[int]]) -> list[tuple[float, ...]]:
        """Return the log-probabilities (nats) of each sequence, from its second token on."""
        asked = [TokenRequest(self._name, one) for one in sequences]
        return [reply.logprobs for reply in self._server.ask(asked, lambda: self.advance(1))]


def chunks(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield requests in groups of `CHUNK`."""
    yield from (requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK))


@contextlib.contextmanager
def open_server(
    job: Mapping[str, Any], tokenizer: Any
) -> Iterator[Callable[[dict[str, Any], Find | None], Served]]:
    """Yield the function that returns a model of the job, on a server that has been checked.

    Args:
        job: Job with the models, which are all on the same weights.
        tokenizer: Tokenizer of the base model.

    Raises:
        ConfigError: The server does not load an adapter or cannot score a sequence.
        StageError: The server does not start, or does not tell the models apart.
    """
    models = list(job["models"].values())
    weights = models[0]["weights"]
    with start_vllm(job["vllm"]) if job["vllm"] else contextlib.nullcontext(job["endpoint"]) as limits:
        params = EndpointParams(**limits)
        server = Completions(params, models[0]["weights_name"], greedy(weights, tokenizer))
        length = context_length(AutoConfig.from_pretrained(weights))
        served = read_server(params).models[models[0]["weights_name"]].get("max_model_len") or length
        # A server generates one token at least.
        max_length = min(length, served) - 1
        adapters = {one["served"]: one["lora"] for one in models if one["lora"]}
        with load_adapters(params, adapters):
            prove_distinct(server, [models[0]["weights_name"], *adapters], tokenizer, max_length)
            yield lambda one, find: Served(server, one["served"], tokenizer, max_length, find)


def greedy(weights: str, tokenizer: Any) -> dict[str, Any]:
    """Return the parameters of greedy generation as transformers reads them from the model's folder."""
    config = GenerationConfig()
    if (Path(weights) / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(weights)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {
        "stop_token_ids": sorted({one for one in (*stops, tokenizer.eos_token_id) if one is not None}),
        "repetition_penalty": config.repetition_penalty or 1.0,
        "skip_special_tokens": False,
    }


@contextlib.contextmanager
def load_adapters(params: EndpointParams, adapters: Mapping[str, str]) -> Iterator[None]:
    """Load adapters into a running server, and remove them afterwards.

    Args:
        params: Server.
        adapters: Name on the server -> folder, which the server must see under the same path.

    Raises:
        ConfigError: The server does not load an adapter.
    """
    known = read_server(params).models
    with httpx.Client(headers=authorization(params), timeout=LOAD_SECONDS) as client:
        try:
            for name, folder in adapters.items():
                if name in known:
                    continue
                asked = {"lora_name": name, "lora_path": folder}
                answer = client.post(f"{params.base_url}/load_lora_adapter", json=asked)
                if answer.status_code != httpx.codes.OK:
                    raise ConfigError(
                        f"evaluate.endpoint: {params.base_url} does not load the adapter {folder}: "
                        f"{answer.status_code} {answer.text.strip()[:300]}; start vLLM with --enable-lora "
                        f"and {ALLOW_ADAPTERS}=True, where this path exists"
                    )
            yield
        finally:
            for name in adapters:
                with contextlib.suppress(httpx.HTTPError):
                    client.post(f"{params.base_url}/unload_lora_adapter", json={"lora_name": name})


def prove_distinct(server: Completions, names: Sequence[str], tokenizer: Any, max_length: int) -> None:
    """Require that models have different log-probabilities: a server may ignore an adapter, or its name.

    Args:
        server: The server.
        names: Names of models with different weights, the base first.
        tokenizer: Tokenizer of the base model.
        max_length: Tokens of a sequence, at most.

    Raises:
        StageError: Two models are the same as far as can be told.
    """
    if len(names) < 2:
        return
    asker = Served(server, names[0], tokenizer, max_length, None)
    probes = [asker.tok_encode(asker.render_prompt(question))[:max_length] for question in PROBES]

    def measure(name: str) -> list[float]:
        # One after the other: in a batch, the same model may give other digits.
        return [
            nats
            for one in probes
            for reply in server.ask([TokenRequest(name, one)])
            for nats in reply.logprobs
        ]

    def distance(one: Sequence[float], other: Sequence[float]) -> float:
        return max(abs(a - b) for a, b in zip(one, other, strict=True))

    found = {name: measure(name) for name in names}
    noise = distance(found[names[0]], measure(names[0]))
    for one, other in combinations(names, 2):
        if distance(found[one], found[other]) <= noise:
            raise StageError(
                f"evaluate: the server gives {one} and {other} the same log-probabilities (within {noise:g}):"
                " it serves one model under both names, or the adapter changes nothing; check that the "
                "server applies adapters, and the loss of the training"
            )
