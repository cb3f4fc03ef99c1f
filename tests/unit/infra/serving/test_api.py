"""Responses of the API, with a small random model."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from infra.cli import serve
from infra.serving import api
from infra.serving.engine import Engine, Generation
from infra.serving.request import ChatRequest
from nightshift.registry.served_model import generate

MESSAGES = [{"role": "user", "content": "Who are you?"}]
URL = "/v1/chat/completions"


def expected(lively: tuple[Any, Any], limit: int) -> str:
    """Return the greedy answer of the model."""
    model, tokenizer = lively
    return str(tokenizer.decode(generate(model, tokenizer, MESSAGES, limit)[1], skip_special_tokens=True))


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post(URL, json={"messages": MESSAGES, "max_tokens": 8, **fields})


def test_a_model_is_listed_with_its_version(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "model": "nightshift@3"}
    (found,) = client.get("/v1/models").json()["data"]
    assert found == {
        "id": "nightshift",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "nightshift",
        "version": 3,
    }


def test_an_answer_is_the_models_greedy_answer(client: TestClient, lively: tuple[Any, Any]) -> None:
    reply = ask(client)
    assert reply.headers["x-nightshift-model"] == "nightshift@3"
    answer = ChatCompletion.model_validate(reply.json(), strict=True)
    assert (answer.model, answer.choices[0].finish_reason) == ("nightshift@3", "length")
    assert answer.choices[0].message.content == expected(lively, 8)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_streamed_answer_is_the_same(client: TestClient, lively: tuple[Any, Any]) -> None:
    reply = ask(client, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-nightshift-model"] == "nightshift@3"
    *lines, last = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert last == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(json.loads(line), strict=True) for line in lines]
    assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, "nightshift@3")}
    *words, end, count = chunks
    assert len(words) > 1
    assert words[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in words) == expected(lively, 8)
    assert end.choices[0].finish_reason == "length"
    assert (count.choices, count.usage and count.usage.completion_tokens) == ([], 8)


def test_usage_is_streamed_on_request_only(client: TestClient) -> None:
    assert "usage" not in ask(client, stream=True).text


@pytest.fixture
def brief(lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model stop at once: its first token is a stop token."""
    model, tokenizer = lively
    first = int(generate(model, tokenizer, MESSAGES, 1)[1][0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first])


@pytest.mark.usefixtures("brief")
def test_an_answer_that_ended_by_itself_says_so(client: TestClient) -> None:
    body = ask(client).json()
    assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("stop", 1)
    assert '"finish_reason": "stop"' in ask(client, stream=True).text


def test_a_seed_repeats_a_sampled_answer(client: TestClient, lively: tuple[Any, Any]) -> None:
    def sample(seed: int | None) -> str:
        return str(ask(client, temperature=2.0, seed=seed).json()["choices"][0]["message"]["content"])

    assert sample(1) == sample(1)
    assert len({expected(lively, 8), sample(1), sample(2), sample(None), sample(None)}) == 5


def test_the_random_state_of_a_seed_is_not_used_again(client: TestClient) -> None:
    ask(client, temperature=1.0, seed=7)
    before = torch.initial_seed()
    ask(client)
    assert torch.initial_seed() != before


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_beyond_the_context_is_an_error(client: TestClient, *, stream: bool) -> None:
    reply = ask(client, messages=[{"role": "user", "content": "word " * 2100}], stream=stream)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert error["type"] == "invalid_request_error"
    assert "the model's context is 2048 tokens" in error["message"]


def test_an_unsupported_parameter_is_an_error(client: TestClient) -> None:
    reply = ask(client, n=2)
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": "n: not supported; remove it",
        "type": "invalid_request_error",
        "param": "n",
        "code": None,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "the body is not valid JSON"),
        ("[]", "body: Input should be a valid dictionary or object to extract fields from"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages.0.content: only parts of type text are supported",
        ),
    ],
)
def test_a_malformed_body_is_an_error(client: TestClient, body: str, message: str) -> None:
    reply = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, message)


def test_a_conversation_that_the_template_rejects_is_an_error(
    client: TestClient, lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lively[1], "chat_template", "{{ raise_exception('roles must alternate') }}")
    reply = ask(client)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].endswith("rejects the messages: roles must alternate")


@pytest.mark.parametrize("name", ["nightshift", "nightshift@3", None])
def test_the_served_model_has_two_names(client: TestClient, name: str | None) -> None:
    assert ask(client, model=name).status_code == 200


@pytest.mark.parametrize("name", ["gpt-4", "nightshift@2", ""])
def test_another_model_is_not_found(client: TestClient, name: str) -> None:
    reply = ask(client, model=name)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert reply.json()["error"]["message"] == f"model {name!r} is not served here, but nightshift@3 is"


def test_an_unknown_path_has_the_same_shape_of_error(client: TestClient) -> None:
    for path, status in (("/v1/embeddings", 404), ("/docs", 404), ("/openapi.json", 404), (URL, 405)):
        reply = client.get(path)
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_body_that_is_too_large_is_rejected(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "a" * api.MAX_BODY_BYTES}]}).encode()
    headers = {"content-type": "application/json"}
    assert client.post(URL, content=large, headers=headers).status_code == 413
    # Without Content-Length.
    assert client.post(URL, content=iter([large[:1000], large[1000:]]), headers=headers).status_code == 413


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}],
    ids=["host", "origin", "file"],
)
def test_a_web_page_of_another_site_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    for reply in (client.get("/health", headers=headers), client.options(URL, headers=headers)):
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers


@pytest.fixture
def steps(lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each token."""
    found: list[int] = []
    forward = lively[0].forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(lively[0], "forward", counted)
    return found


def test_an_answer_that_nobody_waits_for_is_not_generated(engine: Engine, steps: list[int]) -> None:
    request = ChatRequest.model_validate({"messages": MESSAGES, "max_tokens": 1500})

    async def leave_early() -> None:
        async with aclosing(Generation(engine, request).pieces()) as running:
            await anext(running)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(Generation(engine, request).pieces()), 0.01)
        # While the server runs, only closing ends the generation.
        await asyncio.to_thread(engine.thread.submit(lambda: None).result)

    asyncio.run(leave_early())
    assert 0 < len(steps) < 1000


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    """Serve the API on a real port."""
    with serve.listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(api.build_app(engine), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{URL}"
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_generation(
    url: str, engine: Engine, steps: list[int], *, stream: bool
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1900, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", url, json=body, timeout=0.2) as reply,
    ):
        next(reply.iter_lines())
    engine.thread.submit(lambda: None).result()
    assert 0 < len(steps) < 1000
