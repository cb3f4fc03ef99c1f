"""`nightshift serve`: a real server process, a real registry, and the `openai` client."""

import gc
import logging
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from mlflow.artifacts import download_artifacts

from infra.cli import serve
from infra.serving.engine import Engine
from infra.serving.follow import RETRY_SECONDS, Follower
from infra.serving.model import load_address
from nightshift.core.errors import ConfigError
from nightshift.core.files import tree_digest
from nightshift.core.ports import free_port
from nightshift.registry import versions
from nightshift.registry.served_model import generate, load
from tasks import register
from tests.helpers.champion import enter
from tests.helpers.checkouts import BIN
from tests.integration.test_registry import adapter

ASKED: list[Any] = [{"role": "user", "content": "What is the chemical symbol of Gold?"}]


@pytest.fixture(scope="module")
def shop(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout, and add version 2, and 3 with an adapter that was changed after registration."""
    folder = tmp_path_factory.mktemp("serve") / "checkout"
    shutil.copytree(registered, folder)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        add_version(folder, 2)
        add_version(folder, 3)
        (folder / "versions/3/artifacts/model/adapter_config.json").write_text("{}")
    return folder


def add_version(folder: Path, seed: int) -> None:
    """Register an adapter as the next version, without the checks of `register`."""
    client, name = versions.open_registry()
    source = folder / "versions" / str(seed)
    shutil.copytree(download_artifacts(f"models:/{name}/1"), source)
    shutil.rmtree(source / "artifacts/model")
    shutil.copytree(adapter(seed), source / "artifacts/model")
    version = client.create_model_version(name, source.as_uri())
    assert int(version.version) == seed
    client.set_model_version_tag(name, str(seed), versions.DIGEST, tree_digest(adapter(seed)))


def promote(version: int) -> None:
    """Move the alias, as a promotion would."""
    client, name = versions.open_registry()
    client.set_registered_model_alias(name, "champion", str(version))


@pytest.fixture
def inside(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter the checkout, with version 1 as the champion."""
    enter(monkeypatch, shop)
    promote(1)
    return shop


def expected(seed: int, limit: int = 8) -> str:
    """Return the greedy answer of an adapter."""
    model, tokenizer = load(register.BASE, adapter(seed))
    return str(tokenizer.decode(generate(model, tokenizer, ASKED, limit)[1], skip_special_tokens=True))


class Process:
    """A running `nightshift serve`, in a process group of its own, and its output."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(BIN / "nightshift"), "serve", *arguments, "--port", str(self.port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait_for(lambda: httpx.get(f"{self.url}/health", timeout=120).status_code == 200)

    def wait_for(self, condition: Any) -> None:
        """Wait until something is the case."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        pytest.fail(f"waited for too long: {self.log.read_text()}")

    def client(self) -> openai.OpenAI:
        """Return a client that repeats no request."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, **options: Any) -> Any:
        """Ask for an answer of up to 8 tokens."""
        create = self.client().chat.completions.create
        return create(model="nightshift", messages=ASKED, max_tokens=8, **options)


@pytest.fixture(scope="module")
def server(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Serve the champion, and check the alias twice per second."""
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, shop)
        promote(1)
        started = Process(tmp_path_factory.mktemp("log") / "log", "--interval", "0.5")
        yield started
        started.process.kill()
        started.process.wait()


@pytest.mark.usefixtures("inside")
def test_the_openai_client_gets_the_champions_answers(server: Process) -> None:
    server.wait_for(lambda: server.ask().model == "nightshift@1")
    answer = server.ask()
    assert answer.choices[0].message.content == expected(1)
    chunks = list(server.ask(stream=True, temperature=0))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(1)
    assert {chunk.model for chunk in chunks} == {"nightshift@1"}
    (model,) = server.client().models.list()
    assert (model.id, model.model_extra) == ("nightshift", {"version": 1})
    with pytest.raises(openai.BadRequestError, match="context is 64 tokens") as caught:
        server.client().chat.completions.create(model="nightshift", messages=ASKED * 20)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.usefixtures("inside")
def test_a_new_champion_takes_over_while_requests_succeed(server: Process) -> None:
    server.wait_for(lambda: server.ask().model == "nightshift@1")
    found: list[tuple[str, str]] = []
    stop = threading.Event()

    def ask_on(*, stream: bool) -> None:
        while not stop.is_set():
            if stream:
                chunks = list(server.ask(stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert chunks[-1].choices[0].finish_reason
                found.append((chunks[0].model, text))
            else:
                answer = server.ask()
                found.append((answer.model, answer.choices[0].message.content))

    threads = [threading.Thread(target=ask_on, kwargs={"stream": stream}) for stream in (True, False)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: found)
    promote(2)
    server.wait_for(lambda: found and found[-1][0] == "nightshift@2")
    # A thread ends early if a request fails.
    assert all(thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(found) == {("nightshift@1", expected(1)), ("nightshift@2", expected(2))}
    assert "nightshift@2 took over from nightshift@1" in server.log.read_text()
    with pytest.raises(openai.NotFoundError, match="nightshift@2 is"):
        server.client().chat.completions.create(model="nightshift@1", messages=ASKED)


@pytest.mark.usefixtures("inside")
def test_a_broken_champion_is_reported_and_not_served(server: Process) -> None:
    server.wait_for(lambda: server.ask().model == "nightshift@1")
    promote(3)
    problem = (
        "ERROR nightshift@1 keeps serving, nightshift@3 does not load: GateError: registry: version 3 of"
    )
    server.wait_for(lambda: problem in server.log.read_text())
    assert server.ask().model == "nightshift@1"
    promote(2)
    server.wait_for(lambda: server.ask().model == "nightshift@2")
    assert server.log.read_text().count(problem) == 1


@pytest.mark.usefixtures("inside")
def test_a_taken_port_is_an_error_in_one_line(server: Process) -> None:
    command = [str(BIN / "nightshift"), "serve", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    holder = f"in use: pid {server.process.pid} (nightshift)"
    assert done.stderr.splitlines()[-1] == (
        f"error: nightshift serve: cannot listen on 127.0.0.1:{server.port}: {holder}; "
        "choose another --port or --host"
    )


@pytest.mark.usefixtures("inside")
def test_only_loopback_is_served(server: Process) -> None:
    listening = [c for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
    assert [connection.laddr for connection in listening] == [("127.0.0.1", server.port)]
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.usefixtures("inside")
def test_ctrl_c_ends_it_without_a_traceback(server: Process) -> None:
    with server.ask(stream=True) as chunks:
        next(iter(chunks))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(120) == 0
    text = server.log.read_text()
    assert text.splitlines()[-1].endswith("INFO stopped")
    assert "Traceback" not in text


@pytest.mark.usefixtures("inside")
def test_a_killed_server_leaves_nothing_behind(tmp_path: Path) -> None:
    """It serves an exported folder, here the base, which has no version."""
    server = Process(tmp_path / "log", str(register.BASE))
    assert [model.id for model in server.client().models.list()] == ["model"]
    answer = server.client().chat.completions.create(model="model", messages=ASKED, max_tokens=2)
    assert answer.model == "model"
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    assert children == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        (
            "challenger",
            "registry: no version of nightshift has the alias challenger; see `nightshift history`",
        ),
        ("3", "registry: version 3 of nightshift contains an adapter with digest"),
    ],
)
@pytest.mark.usefixtures("inside")
def test_a_version_that_cannot_be_served_is_an_error_in_one_line(address: str, problem: str) -> None:
    command = [str(BIN / "nightshift"), "serve", address, "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {problem}")


@pytest.mark.usefixtures("inside")
def test_a_registry_that_is_down_at_the_start_is_an_error_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="start it with `nightshift up`, or set") as caught:
        serve.load("champion")
    assert "secret" not in str(caught.value)


@pytest.fixture
def follower(inside: Path) -> Iterator[Follower]:
    """Serve the champion in this process."""
    found = Follower(Engine(load_address("champion")), "champion")
    yield found
    found.engine.thread.shutdown()


def test_the_replaced_version_is_released(follower: Follower) -> None:
    before = weakref.ref(follower.engine.served.model)
    # As the traceback of an import does that failed while the first model was loaded.
    follower.engine.served.model.cycle = [follower.engine.served.model]
    gc.disable()
    try:
        promote(2)
        follower.check()
        follower.engine.thread.submit(lambda: None).result()
        assert follower.engine.served.label == "nightshift@2"
        assert before() is None
    finally:
        gc.enable()


def test_an_outage_of_the_registry_is_reported_once(
    follower: Follower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "infra.serving.follow")
    promote(2)
    with monkeypatch.context() as outage:
        outage.setenv("MLFLOW_TRACKING_URI", f"http://ada:secret@127.0.0.1:{free_port()}")
        outage.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        follower.check()
        follower.check()
        assert follower.engine.served.label == "nightshift@1"
    follower.check()
    assert follower.engine.served.label == "nightshift@2"
    down, *rest = caplog.messages
    assert down.startswith(
        "nightshift@1 keeps serving, champion is looked up again: MlflowException: API request"
    )
    assert rest == [
        "registry: champion found again",
        "champion: now version 2; loading it",
        "nightshift@2 took over from nightshift@1",
    ]
    assert "secret" not in caplog.text


def test_a_version_that_failed_is_tried_again_later(
    follower: Follower, inside: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [time.monotonic()]
    monkeypatch.setattr("infra.serving.follow.time.monotonic", lambda: clock[0])
    promote(2)
    with monkeypatch.context() as patch:
        patch.setenv("NIGHTSHIFT_BASE", str(inside / "elsewhere"))
        follower.check()
        follower.check()
    assert len(caplog.messages) == 1
    assert "not found; set NIGHTSHIFT_BASE to a folder with the files of the base" in caplog.text
    follower.check()
    assert follower.engine.served.label == "nightshift@1"
    clock[0] += RETRY_SECONDS
    follower.check()
    assert follower.engine.served.label == "nightshift@2"
