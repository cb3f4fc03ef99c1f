"""The `openai` backend against a real transformers server on the loopback interface, with faults."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import read_json, write_json
from nightshift.core.memo import Memo
from nightshift.core.ports import free_port
from nightshift.replies import EndpointParams, Failure, Reply, Request, ask
from nightshift.replies.endpoint import Endpoint
from tests.helpers.checkouts import BIN

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8}


class Server:
    """A `transformers serve` process with one model."""

    def __init__(self, model: Path, log: Path) -> None:
        self.port = free_port()
        self.model = str(model)
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(BIN / "transformers"), "serve", self.model, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        self._wait(log)

    def _wait(self, log: Path) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def brief_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a small model whose answers end after one word: nearly every token is an EOS token."""
    folder = tmp_path_factory.mktemp("brief") / "model"
    shutil.copytree(tiny_base, folder)
    vocabulary = read_json(folder / "config.json")["vocab_size"]
    write_json(folder / "generation_config.json", {"eos_token_id": list(range(20, vocabulary))})
    return folder


@pytest.fixture(scope="module")
def server(brief_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(brief_base, tmp_path_factory.mktemp("serve") / "log")
    yield started
    started.kill()


class Proxy(BaseHTTPRequestHandler):
    """A proxy that first returns the faults queued by a test, then forwards to the real server."""

    target: ClassVar[int] = 0
    faults: ClassVar[list[str]] = []
    seen: ClassVar[list[float]] = []
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            self.seen.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else "none"
        match fault:
            case "429":
                self._send(429, b"{}", {"Retry-After": "0.7"})
            case "500":
                self._send(500, b"{}")
            case "401" | "400":
                self._send(int(fault), b"{}")
            case "truncated":
                choice = {
                    "index": 0,
                    "finish_reason": "length",
                    "message": {"role": "assistant", "content": "I"},
                }
                answer = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "m",
                    "choices": [choice],
                }
                self._send(200, json.dumps(answer).encode())
            case "garbage":
                self._send(200, b"<html>not JSON")
            case "hang":
                time.sleep(3)
            case "drop":
                self.connection.close()
            case _:
                url = f"http://127.0.0.1:{self.target}{self.path}"
                kind = {"Content-Type": "application/json"}
                response = httpx.post(url, content=body, headers=kind, timeout=60)
                self._send(response.status_code, response.content)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Suppress request logging."""


@pytest.fixture
def proxy(server: Server) -> Iterator[str]:
    Proxy.target, Proxy.faults, Proxy.seen = server.port, [], []
    web = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_address[1]}/v1"
    web.shutdown()
    web.server_close()
    thread.join()


def params(base_url: str, **changes: Any) -> EndpointParams:
    values = {
        "base_url": base_url,
        "api_key_env": None,
        "max_concurrency": 1,
        "requests_per_minute": 6000,
        "tokens_per_minute": 1_000_000,
        # On a busy machine an answer takes seconds.
        "timeout_seconds": 60,
        "max_retries": 2,
        "max_total_tokens": 1_000_000,
    }
    return EndpointParams(**{**values, **changes})


def requests(count: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"Say {i}."}], 1, 0) for i in range(count)]


def run(server: Server, base_url: str, count: int, **changes: Any) -> tuple[list[Any], list[int]]:
    """Send `count` requests; return the results and the request numbers reported meanwhile."""
    reported: list[int] = []
    endpoint = Endpoint(server.model, SAMPLING, params(base_url, **changes), "augment")
    return endpoint(requests(count), lambda number, reply: reported.append(number)), reported


def test_a_real_server_answers_concurrent_requests(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    results, reported = run(server, url, 6, max_concurrency=3, timeout_seconds=60)
    assert [type(result) for result in results] == [Reply] * 6
    assert sorted(reported) == [0, 1, 2, 3, 4, 5]
    assert all(result.tokens > 2 and result.texts[0] for result in results)


@pytest.mark.parametrize("fault", ["429", "500", "garbage", "hang", "drop"])
def test_a_transient_fault_is_retried(server: Server, proxy: str, fault: str) -> None:
    Proxy.faults = [fault]
    results, _ = run(server, proxy, 1, timeout_seconds=5 if fault == "hang" else 60)
    assert isinstance(results[0], Reply)
    assert len(Proxy.seen) == 2


def test_retry_after_is_respected(server: Server, proxy: str) -> None:
    Proxy.faults = ["429"]
    run(server, proxy, 1)
    assert Proxy.seen[1] - Proxy.seen[0] >= 0.7


def test_a_request_that_fails_permanently_does_not_stop_the_others(server: Server, proxy: str) -> None:
    Proxy.faults = ["500", "500", "500"]
    results, reported = run(server, proxy, 3)
    assert results[0] == Failure("server_error")
    assert [type(result) for result in results[1:]] == [Reply, Reply]
    assert reported == [1, 2]


def test_an_authentication_error_stops_at_once_with_a_remedy(server: Server, proxy: str) -> None:
    Proxy.faults = ["401"]
    with pytest.raises(ConfigError, match="returned 401"):
        run(server, proxy, 1)
    assert len(Proxy.seen) == 1


@pytest.mark.parametrize(("fault", "reason"), [("400", "refused"), ("truncated", "truncated")])
def test_a_bad_request_and_a_truncated_answer_are_not_retried(
    server: Server, proxy: str, fault: str, reason: str
) -> None:
    Proxy.faults = [fault]
    results, reported = run(server, proxy, 2)
    assert results[0] == Failure(reason)
    assert reported == [1]
    assert len(Proxy.seen) == 2


def test_a_server_that_answers_no_request_is_an_error_even_for_few_requests(
    server: Server, proxy: str
) -> None:
    Proxy.faults = ["500"] * 2
    with pytest.raises(StageError, match="none of 2 requests was answered"):
        run(server, proxy, 2, max_retries=0)


def test_a_spent_token_budget_stops_cleanly_and_the_rest_is_counted(server: Server, proxy: str) -> None:
    results, reported = run(server, proxy, 12, max_total_tokens=100, max_concurrency=4)
    answered = [result for result in results if isinstance(result, Reply)]
    assert 1 <= len(answered) == len(reported) < 12
    assert sum(reply.tokens for reply in answered) <= 100
    assert results[-1] == Failure("budget_spent")


def test_the_rate_limit_applies_across_calls(server: Server, proxy: str) -> None:
    endpoint = Endpoint(
        server.model, SAMPLING, params(proxy, requests_per_minute=60, timeout_seconds=30), "augment"
    )
    for _ in range(2):
        endpoint(requests(2), lambda number, reply: None)
    # Four requests at one per second: the last starts three seconds after the first.
    assert len(Proxy.seen) == 4
    assert Proxy.seen[3] - Proxy.seen[0] >= 2.5


def test_the_key_comes_from_the_environment_and_is_required(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NIGHTSHIFT_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="NIGHTSHIFT_TEST_KEY, but this variable is not set"):
        run(server, "http://127.0.0.1:1/v1", 1, api_key_env="NIGHTSHIFT_TEST_KEY")


def test_replies_received_before_the_server_died_are_kept(brief_base: Path, tmp_path: Path) -> None:
    mortal = Server(brief_base, tmp_path / "log")
    url = f"http://127.0.0.1:{mortal.port}/v1"
    endpoint = Endpoint(mortal.model, SAMPLING, params(url, max_retries=0, timeout_seconds=30), "augment")
    kept: list[int] = []

    def kill_after_three(number: int, reply: Reply) -> None:
        kept.append(number)
        if len(kept) == 3:
            mortal.kill()

    with Memo("paraphrases", {}, tmp_path) as memo:

        def generate(asked: Any, on_reply: Any) -> Any:
            def both(number: int, reply: Reply) -> None:
                on_reply(number, reply)
                kill_after_three(number, reply)

            return endpoint(asked, both)

        with pytest.raises(StageError, match="5 requests in a row"):
            ask(requests(12), "m", generate, memo)
        assert kept == [0, 1, 2]
        again = Server(brief_base, tmp_path / "log")
        try:
            url = f"http://127.0.0.1:{again.port}/v1"
            revived = Endpoint(again.model, SAMPLING, params(url, timeout_seconds=60), "augment")
            asked_again: list[Request] = []

            def generate_again(asked: Any, on_reply: Any) -> Any:
                asked_again.extend(asked)
                return revived(asked, on_reply)

            results = ask(requests(12), "m", generate_again, memo)
        finally:
            again.kill()
    assert [type(result) for result in results] == [Reply] * 12
    assert asked_again == requests(12)[3:]
