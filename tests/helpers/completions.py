"""A server of /v1/completions that answers from a transformers model and loads LoRA adapters, like vLLM."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class CompletionServer(ThreadingHTTPServer):
    """A server with a base model.

    Attributes:
        url: Base URL of the API.
        asked: Names of the models asked, in order.
        loaded: Names of the adapters that were loaded, in order.
        applies_adapters: Whether an adapter has an effect.
        returns_prompts: Whether it knows `echo`.
        loads_adapters: Whether it knows /v1/load_lora_adapter.
    """

    # Connections that wait to be accepted.
    request_queue_size = 128

    def __init__(self, base: Path, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.models = {name: AutoModelForCausalLM.from_pretrained(base).eval()}
        self.base, self.lock = base, Lock()
        self.asked: list[str] = []
        self.loaded: list[str] = []
        self.applies_adapters = self.returns_prompts = self.loads_adapters = True

    def load(self, name: str, folder: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.base)
        if self.applies_adapters:
            model = PeftModel.from_pretrained(model, folder)
        self.models[name] = model.eval()
        self.loaded.append(name)

    @torch.inference_mode()
    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        model, prompt = self.models[asked["model"]], asked["prompt"]
        self.asked.append(asked["model"])
        tokens = torch.tensor([prompt])
        if not asked.get("echo"):
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=asked["max_tokens"],
                do_sample=False,
                eos_token_id=asked["stop_token_ids"],
                repetition_penalty=asked["repetition_penalty"],
                pad_token_id=self.tokenizer.pad_token_id,
            )[0, len(prompt) :].tolist()
            made = made[:-1] if made[-1] in asked["stop_token_ids"] else made
            text = self.tokenizer.decode(made, skip_special_tokens=asked["skip_special_tokens"])
            return choice(text, None)
        scores = model(tokens).logits[0].log_softmax(-1)
        found = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
        new = float(scores[-1].max())
        return choice("", [None, *found, new] if self.returns_prompts else [new])


class Handler(BaseHTTPRequestHandler):
    """Routes of the server."""

    server: CompletionServer

    def do_GET(self) -> None:
        match self.path:
            case "/v1/models":
                cards = [{"id": name, "object": "model", "max_model_len": 512} for name in self.server.models]
                self._send(200, {"object": "list", "data": cards})
            case "/version":
                self._send(200, {"version": "1.2.3"})
            case _:
                self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            match self.path:
                case "/v1/completions":
                    self._send(200, self.server.complete(asked))
                case "/v1/load_lora_adapter" if self.server.loads_adapters:
                    self.server.load(asked["lora_name"], asked["lora_path"])
                    self._send(200, {})
                case "/v1/unload_lora_adapter" if self.server.loads_adapters:
                    self.server.models.pop(asked["lora_name"], None)
                    self._send(200, {})
                case _:
                    self._send(404, {"detail": "Not Found"})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Suppress request logging."""


def choice(text: str, logprobs: list[float | None] | None) -> dict[str, Any]:
    """Return an answer with one choice."""
    found = {"token_logprobs": logprobs, "tokens": [], "top_logprobs": [], "text_offset": []}
    one = {"index": 0, "text": text, "finish_reason": "length", "logprobs": found if logprobs else None}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "x",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [one],
        "usage": usage,
    }


@contextmanager
def serve(base: Path, name: str) -> Iterator[CompletionServer]:
    """Serve a base model under a name."""
    server = CompletionServer(base, name)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
