"""Generate paraphrase candidates with the configured backend."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.core.code_digest import MODEL_ENGINES, source_digest, versions
from nightshift.core.errors import ConfigError
from nightshift.core.files import tree_digest
from nightshift.core.memo import Memo
from nightshift.core.state import user_path
from nightshift.replies import Failure, Generate, Reply, Request, Result, ask
from tasks.augment import AugmentParams, Style
from tasks.augment.prompts import VERSION, build_prompt, read_versions
from tasks.augment.quality import Messages
from tasks.augment.rules import propose

# No rule fits the wording of an example.
NO_RULE = "no_rule_fits"


@dataclass(frozen=True, slots=True)
class CandidateRequest:
    """A request for candidates for one example.

    Attributes:
        turns: Turns to paraphrase: user and assistant turns, or one plain text.
        style: Paraphrase style.
        count: Number of candidates.
        avoid: Previously rejected candidates.
        ordinal: Number of the call for this example.
    """

    turns: Messages
    style: Style
    count: int
    avoid: tuple[tuple[str, ...], ...]
    ordinal: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """The candidates for one request.

    Attributes:
        versions: Texts of the turns of each candidate.
        unreadable: Number of malformed versions.
        tokens: Tokens used by the answers.
        failure: Reason why there is no answer, or None.
    """

    versions: list[list[str]]
    unreadable: int = 0
    tokens: int = 0
    failure: str | None = None


Propose = Callable[[Sequence[CandidateRequest]], list[Proposal]]


def by_rules(calls: Sequence[CandidateRequest]) -> list[Proposal]:
    """Propose candidates by rules: immediate, deterministic, style `reword` only."""
    found = [list(propose(call.turns, call.count)) for call in calls]
    return [Proposal(versions, failure=None if versions else NO_RULE) for versions in found]


def by_model(params: AugmentParams, base: Path, memo: Memo) -> Propose:
    """Propose candidates with a local model or an endpoint; replies are cached.

    A local model answers a request several times; an endpoint returns several versions in one answer,
    so that they differ.

    Raises:
        ConfigError: The local model is not a folder with a model.
    """
    sampling = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": params.max_new_tokens,
    }
    local = params.backend == "transformers"
    folder = user_path(params.model) if params.model else base
    if local and not (folder / "config.json").is_file():
        raise ConfigError(
            f"params.yaml: augment.model={params.model}: no config.json in {folder}; set it to the folder "
            "of a model, or to null for the base"
        )
    revision = tree_digest(folder) if local else params.model
    name = json.dumps([params.backend, revision, sampling, params.seed, VERSION], sort_keys=True)
    # A server determines its own replies; those of a local model depend on our code and libraries.
    code = source_digest("tasks/augment/local.py")
    makers = [code, *versions(*MODEL_ENGINES)] if local else [params.endpoint.base_url]
    backend: Generate | None = None

    def generate(requests: Sequence[Request], on_reply: Callable[[int, Reply], None]) -> list[Result]:
        nonlocal backend
        # If all replies are cached, no model is loaded and no server is needed.
        if backend is None:
            backend = load_backend(params, folder, name, sampling)
        return backend(requests, on_reply)

    def propose_all(calls: Sequence[CandidateRequest]) -> list[Proposal]:
        requests = [build_request(call, local=local) for call in calls]
        results = ask(requests, json.dumps([name, *makers]), generate, memo)
        return [_parse_result(call, result) for call, result in zip(calls, results, strict=True)]

    return propose_all


def load_backend(params: AugmentParams, folder: Path, name: str, sampling: dict[str, Any]) -> Generate:
    """Load the local model or create the endpoint client; each needs different packages."""
    if params.backend == "transformers":
        from tasks.augment.local import load_local

        return load_local(folder, name, sampling)
    from nightshift.replies.endpoint import Endpoint

    return Endpoint(str(params.model), sampling, params.endpoint, "augment")


def build_request(call: CandidateRequest, *, local: bool) -> Request:
    """Build a request for one version several times (local), or for several versions at once."""
    versions = 1 if local else call.count
    prompt = build_prompt(call.turns, call.style, versions, call.avoid)
    return Request(prompt, call.count if local else 1, call.ordinal)


def _parse_result(call: CandidateRequest, result: Result) -> Proposal:
    """Parse the versions in all answers."""
    if isinstance(result, Failure):
        return Proposal([], failure=result.reason)
    roles = [turn["role"] for turn in call.turns]
    found = [version for text in result.texts for version in read_versions(text, roles)]
    versions = [version for version in found if version is not None]
    return Proposal(versions, len(found) - len(versions), result.tokens)
