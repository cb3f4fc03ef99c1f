"""From turns that want paraphrases to candidates, by the backend of the configuration."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.core.code_digest import MODEL_ENGINES, source_digest, versions
from nightshift.core.files import tree_digest
from nightshift.core.memo import Memo
from nightshift.replies import Failure, Generate, Reply, Request, Result, ask
from tasks.augment import AugmentParams, Style
from tasks.augment.prompts import VERSION, build_prompt, read_versions
from tasks.augment.quality import Messages
from tasks.augment.rules import propose


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for one example.

    Attributes:
        turns: What is to be said anew: user and assistant turns, or one plain text.
        style: Kind of paraphrase.
        count: Candidates wanted.
        avoid: Candidates that were rejected before.
        ordinal: Number of the call for its example.
    """

    turns: Messages
    style: Style
    count: int
    avoid: tuple[tuple[str, ...], ...]
    ordinal: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """What came of it.

    Attributes:
        versions: The texts of the turns of each candidate.
        unreadable: Versions that had not the right form.
        tokens: Tokens that the answers took.
        failure: Why there is no answer, or None.
    """

    versions: list[list[str]]
    unreadable: int = 0
    tokens: int = 0
    failure: str | None = None


Propose = Callable[[Sequence[Wanted]], list[Proposal]]


def by_rules(wanted: Sequence[Wanted]) -> list[Proposal]:
    """Propose by rules: at once, always the same, the style `reword` only."""
    return [Proposal(list(propose(one.turns, one.count))) for one in wanted]


def by_model(params: AugmentParams, base: Path, memo: Memo) -> Propose:
    """Propose by a model, local or behind an endpoint; replies are kept in the memo.

    A local model answers a request several times over; an endpoint gives several versions in one answer,
    so that they differ.
    """
    sampling = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": params.max_new_tokens,
    }
    local = params.backend == "transformers"
    folder = Path(params.model) if params.model else base
    revision = tree_digest(folder) if local else params.model
    name = json.dumps([params.backend, revision, sampling, params.seed, VERSION], sort_keys=True)
    # A reply of a server is its own; a local model replies by our code and libraries.
    code = source_digest("tasks/augment/local.py")
    makers = [code, *versions(*MODEL_ENGINES)] if local else [params.endpoint.base_url]
    backend: Generate | None = None

    def generate(requests: Sequence[Request], on_reply: Callable[[int, Reply], None]) -> list[Result]:
        nonlocal backend
        # A night whose replies are all known loads no model and needs no server.
        if backend is None:
            backend = load_backend(params, folder, name, sampling)
        return backend(requests, on_reply)

    def propose_all(wanted: Sequence[Wanted]) -> list[Proposal]:
        requests = [build_request(one, local=local) for one in wanted]
        results = ask(requests, json.dumps([name, *makers]), generate, memo)
        return [_read(one, result) for one, result in zip(wanted, results, strict=True)]

    return propose_all


def load_backend(params: AugmentParams, folder: Path, name: str, sampling: dict[str, Any]) -> Generate:
    """Load the local model, or prepare to ask the endpoint; each needs its own packages."""
    if params.backend == "transformers":
        from tasks.augment.local import load_local

        return load_local(folder, name, sampling)
    from nightshift.replies.endpoint import Endpoint

    return Endpoint(str(params.model), sampling, params.endpoint, "augment")


def build_request(wanted: Wanted, *, local: bool) -> Request:
    """Ask for one version several times (local), or for several versions at once."""
    versions = 1 if local else wanted.count
    prompt = build_prompt(wanted.turns, wanted.style, versions, wanted.avoid)
    return Request(prompt, wanted.count if local else 1, wanted.ordinal)


def _read(wanted: Wanted, result: Result) -> Proposal:
    """Read the versions of all answers."""
    if isinstance(result, Failure):
        return Proposal([], failure=result.reason)
    roles = [turn["role"] for turn in wanted.turns]
    found = [version for text in result.texts for version in read_versions(text, roles)]
    versions = [version for version in found if version is not None]
    return Proposal(versions, len(found) - len(versions), result.tokens)
