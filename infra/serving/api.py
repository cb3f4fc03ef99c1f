"""The OpenAI-compatible API: chat completions, the list of models, and health.

Errors have OpenAI's shape. There are no pages for browsers, and no other site may read an answer: no
response has a CORS header.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from infra.serving.engine import Answer, Engine, Generation, UnknownModelError
from infra.serving.request import ChatRequest
from nightshift.registry.served_model import TooLongError

MAX_BODY_BYTES = 4_000_000
# Response header with the version that answered.
VERSION_HEADER = "x-nightshift-model"


def build_app(engine: Engine) -> FastAPI:
    """Build the API of an engine."""
    # Without a schema there are no documentation pages, which would load scripts from another server.
    app = FastAPI(openapi_url=None)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)
    add_error_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": engine.served.label}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = engine.served
        found = {"id": served.name, "object": "model", "created": served.created, "owned_by": "nightshift"}
        return {"object": "list", "data": [{**found, "version": served.version}]}

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        generation = Generation(engine, body)
        if body.stream:
            return await stream(generation)
        return await answer(generation, request)

    return app


async def answer(generation: Generation, request: Request) -> Response:
    """Return the whole answer; stop the generation if the client is gone."""
    async with aclosing(generation.pieces()) as pieces:
        async for _ in pieces:
            if await request.is_disconnected():
                return Response(status_code=499)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": generation.answer.text},
        "finish_reason": finish_reason(generation.answer),
    }
    body = {**head(generation, "chat.completion"), "choices": [choice], "usage": usage(generation.answer)}
    return JSONResponse(body, headers={VERSION_HEADER: generation.label})


async def stream(generation: Generation) -> Response:
    """Return the answer as server-sent events; it begins with the first words, so errors have a status."""
    pieces = generation.pieces()
    first = await anext(pieces, "")
    return StreamingResponse(
        events(generation, first, pieces),
        media_type="text/event-stream",
        headers={VERSION_HEADER: generation.label, "cache-control": "no-cache"},
    )


async def events(
    generation: Generation, first: str, pieces: AsyncGenerator[str, None]
) -> AsyncGenerator[str, None]:
    """Yield the events of a streamed answer: role, words, reason of its end, usage on request."""
    shared = head(generation, "chat.completion.chunk")

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        return format_event({**shared, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    async with aclosing(pieces):
        yield event({"role": "assistant", "content": first})
        async for piece in pieces:
            yield event({"content": piece})
    yield event({}, finish_reason(generation.answer))
    if generation.request.stream_options.include_usage:
        yield format_event({**shared, "choices": [], "usage": usage(generation.answer)})
    yield "data: [DONE]\n\n"


def format_event(value: dict[str, Any]) -> str:
    """Format a value as a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def head(generation: Generation, kind: str) -> dict[str, Any]:
    """Return the fields that all parts of an answer have."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": generation.label}


def finish_reason(answer: Answer) -> str:
    """Return why an answer ended."""
    return "stop" if answer.has_stopped else "length"


def usage(answer: Answer) -> dict[str, int]:
    """Return the number of tokens of an answer."""
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_new,
        "total_tokens": answer.n_prompt + answer.n_new,
    }


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of a request OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, err: RequestValidationError) -> Response:
        fault = err.errors()[0]
        if fault["type"] == "json_invalid":
            return error(400, "the body is not valid JSON")
        where = ".".join(str(part) for part in fault["loc"][1:])
        unknown = fault["type"] == "extra_forbidden"
        text = "not supported; remove it" if unknown else fault["msg"].removeprefix("Value error, ")
        return error(400, f"{where or 'body'}: {text}", where)

    @app.exception_handler(TooLongError)
    async def too_long(_: Request, err: TooLongError) -> Response:
        return error(400, str(err), "messages", "context_length_exceeded")

    @app.exception_handler(TemplateError)
    async def rejected(_: Request, err: TemplateError) -> Response:
        return error(400, f"the model's chat template rejects the messages: {err}", "messages")

    @app.exception_handler(UnknownModelError)
    async def unknown(_: Request, err: UnknownModelError) -> Response:
        return error(404, str(err), "model", "model_not_found")

    @app.exception_handler(HTTPException)
    async def other(_: Request, err: HTTPException) -> Response:
        return error(err.status_code, err.detail)


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """Return an error as OpenAI's API does."""
    fields = {"message": message, "type": "invalid_request_error", "param": param or None, "code": code}
    return JSONResponse({"error": fields}, status)
