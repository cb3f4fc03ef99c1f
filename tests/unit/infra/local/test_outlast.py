"""A run's Prefect client waits for its server instead of ending the run."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from prefect._internal.websockets import websocket_connect
from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient
from prefect.events.clients import RETRYABLE_EXCEPTIONS
from websockets.asyncio.client import ClientConnection

from infra.local import outlast

OUTAGE_SECONDS = 1.0


class Answer(BaseHTTPRequestHandler):
    """A server that answers every request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Suppress request logging."""


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back the methods that a test replaces."""
    for client in (PrefectHttpxSyncClient, PrefectHttpxAsyncClient):
        monkeypatch.setattr(client, "send", client.send)
    monkeypatch.setattr(ClientConnection, "handshake", ClientConnection.handshake)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a server that comes up a second after the test starts."""
    with HTTPServer(("127.0.0.1", 0), Answer) as probe:
        port = probe.server_port
    servers: list[HTTPServer] = []

    def serve() -> None:
        time.sleep(OUTAGE_SECONDS)
        servers.append(HTTPServer(("127.0.0.1", port), Answer))
        servers[0].serve_forever(poll_interval=0.05)

    monkeypatch.setattr(outlast, "RETRY_SECONDS", 0.1)
    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    while not servers:
        time.sleep(0.05)
    servers[0].shutdown()
    servers[0].server_close()
    thread.join()


def test_a_plain_client_fails_immediately(url: str) -> None:
    with (
        pytest.raises(httpx.ConnectError),
        PrefectHttpxSyncClient(base_url=url, enable_csrf_support=False) as client,
    ):
        client.get("/")


def test_a_client_waits_for_its_server_and_reports_the_outage_once(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    outlast.outlast_outages()
    with (
        caplog.at_level("INFO", logger="prefect.outlast"),
        PrefectHttpxSyncClient(base_url=url, enable_csrf_support=False) as client,
    ):
        assert client.get("/").status_code == 200
        assert client.get("/").status_code == 200
    messages = [
        record.getMessage().split(" (")[0] for record in caplog.records if record.name == "prefect.outlast"
    ]
    assert messages == ["the Prefect server is unreachable", "the Prefect server is back"]


def test_an_asynchronous_client_waits_too(url: str) -> None:
    outlast.outlast_outages()

    async def ask() -> int:
        async with PrefectHttpxAsyncClient(base_url=url, enable_csrf_support=False) as client:
            return (await client.get("/")).status_code

    assert asyncio.run(ask()) == 200


def test_an_error_response_is_not_an_outage(url: str) -> None:
    time.sleep(OUTAGE_SECONDS + 0.5)
    outlast.outlast_outages()
    with (
        PrefectHttpxSyncClient(base_url=url, enable_csrf_support=False) as client,
        pytest.raises(httpx.HTTPStatusError, match="501"),
    ):
        client.post("/")


def test_a_server_that_dies_during_a_handshake_is_an_outage() -> None:
    """Prefect knows an OSError as an outage of the event stream, but not websockets' InvalidMessage."""
    outlast.outlast_outages()

    async def connect_to_dying_server() -> None:
        def die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(die, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with websocket_connect(f"ws://127.0.0.1:{port}/api/events/in"):
                pass

    with pytest.raises(RETRYABLE_EXCEPTIONS, match="did not receive a valid HTTP response"):
        asyncio.run(connect_to_dying_server())
