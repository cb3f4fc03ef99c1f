"""The loaded version, and the one thread that uses it.

Loading and generating share a thread, because neither may run beside another one: transformers changes
torch's default dtype while it loads a model, and PEFT replaces a method of the model while it generates.
Requests that arrive meanwhile wait for their turn.
"""

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from mlflow.entities.model_registry import ModelVersion
from transformers import TextStreamer

from infra.serving.model import Served, load_version
from infra.serving.request import ChatRequest
from nightshift.registry.served_model import generate, has_stopped


class UnknownModelError(ValueError):
    """The request names another model or version than the served one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer.

    Attributes:
        text: Text without special tokens.
        has_stopped: Whether the model ended the answer; otherwise it reached the limit.
        n_prompt: Number of tokens of the conversation.
        n_new: Number of new tokens.
    """

    text: str
    has_stopped: bool
    n_prompt: int
    n_new: int


class Engine:
    """The served version, and the thread that loads and generates."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.thread = ThreadPoolExecutor(1, "engine")

    def replace(self, version: ModelVersion, base: Path, adapter: Path) -> None:
        """Load a version between two answers; all later answers are by this version."""
        self.thread.submit(self._replace, version, base, adapter).result()

    def _replace(self, version: ModelVersion, base: Path, adapter: Path) -> None:
        self.served = load_version(version, base, adapter)

    def release(self) -> None:
        """Free the memory of models that are no longer served; a reference cycle may still hold them."""
        # At the end of the process, the thread accepts no more work.
        with contextlib.suppress(RuntimeError):
            self.thread.submit(free_memory)


def free_memory() -> None:
    """Collect unreachable objects, and return their memory to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


class Generation:
    """An answer in progress.

    Attributes:
        label: Label of the version that answers; known before the first piece of text.
        answer: The complete answer; known after the last piece.
    """

    def __init__(self, engine: Engine, request: ChatRequest) -> None:
        """Prepare the generation, in a coroutine; `pieces` starts it."""
        self.engine, self.request = engine, request
        self.label, self.answer = "", Answer("", has_stopped=False, n_prompt=0, n_new=0)
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.is_closed = Event()

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yield the text in whole words as they come; closing stops the generation.

        Raises:
            UnknownModelError: Another model is served.
            TooLongError: The conversation leaves no room for an answer.
            TemplateError: The chat template rejects the conversation.
        """
        work = self.loop.run_in_executor(self.engine.thread, self._generate)
        work.add_done_callback(lambda _: self.queue.put_nowait(None))
        try:
            while (piece := await self.queue.get()) is not None:
                yield piece
            await work
        finally:
            self.is_closed.set()
            work.cancel()

    def _generate(self) -> None:
        """Answer with the version that is served now; runs in the engine's thread."""
        served, request = self.engine.served, self.request
        if request.model not in (None, served.name, served.label):
            raise UnknownModelError(f"model {request.model!r} is not served here, but {served.label} is")
        self.label = served.label
        if request.seed is None:
            torch.seed()
        else:
            torch.manual_seed(request.seed)
        n_prompt, new = generate(
            served.model,
            served.tokenizer,
            request.turns,
            request.limit,
            streamer=Words(served.tokenizer, self._send),
            stopping_criteria=[lambda *_, **__: self.is_closed.is_set()],
            **request.sampling,
        )
        text = served.tokenizer.decode(new, skip_special_tokens=True)
        self.answer = Answer(text, has_stopped(served.model, new), n_prompt, len(new))

    def _send(self, piece: str) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, piece)


class Words(TextStreamer):
    """Pass on generated text in whole words, as transformers' streamers do, to a function."""

    def __init__(self, tokenizer: Any, send: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.send = send

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002
        """Pass on a piece that is not empty."""
        if text:
            self.send(text)
