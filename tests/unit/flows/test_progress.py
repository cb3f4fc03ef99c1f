"""Progress is reported to Prefect in the background; late or failed reports do not affect the stage."""

import logging
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from flows import stages

ARTIFACT = UUID(int=1)


class Server:
    """Prefect's progress artifacts; the first response is delayed until the test releases it."""

    def __init__(self) -> None:
        self.release, self.called = threading.Event(), threading.Event()
        self.shown: list[str] = []
        self.error: Exception | None = None

    def create(self, progress: float, *, key: str, description: str) -> UUID:
        self.called.set()
        self.release.wait(timeout=60)
        if self.error:
            raise self.error
        self.shown.append(f"{key} {progress:.0f} {description}")
        return ARTIFACT

    def update(self, artifact: UUID, *, progress: float, description: str) -> None:
        assert artifact == ARTIFACT
        self.shown.append(f"{progress:.0f} {description}")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(stages, "create_progress_artifact", server.create)
    monkeypatch.setattr(stages, "update_progress_artifact", server.update)
    monkeypatch.setattr(stages, "get_run_logger", lambda: logging.getLogger("run"))
    yield server
    server.release.set()
    wait_for_sender()


def wait_for_sender() -> None:
    for thread in threading.enumerate():
        if thread.name == stages.PROGRESS_THREAD:
            thread.join(timeout=60)


def test_a_hung_server_does_not_delay_the_stage(server: Server) -> None:
    with stages.progress("sft") as read:
        for step in range(1, 1001):
            read(f"12:00:00 step {step}/1000 loss 1.0")
    assert server.shown == []


def test_a_slow_server_gets_only_the_latest_steps(server: Server) -> None:
    with stages.progress("sft") as read:
        read("step 1/4 loss 9")
        server.called.wait(timeout=60)
        read("step 2/4 loss 8")
        read("no step at all")
        read("step 3/4 loss 7")
        server.release.set()
    wait_for_sender()
    assert server.shown == ["sft-progress 25 step 1/4 loss 9", "75 step 3/4 loss 7"]


def test_an_error_after_the_end_is_ignored(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.error = RuntimeError("Cannot send a request, as the client has been closed.")
    with stages.progress("sft") as read:
        read("step 1/2")
        server.called.wait(timeout=60)
    server.release.set()
    wait_for_sender()
    assert caplog.text == ""


@pytest.mark.parametrize("error", [ConnectionError("away"), ValueError("refused")])
def test_a_failing_server_is_reported_once_and_stops_nothing(
    error: Exception, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.error = error
    server.release.set()
    lines: list[Any] = []
    with stages.progress("sft") as read:
        for line in ("step 1/2", "step 2/2"):
            read(line)
            lines.append(line)
        wait_for_sender()
    assert lines == ["step 1/2", "step 2/2"]
    assert caplog.text.count(f"sft: progress is not shown: {error}") == 1
