"""One file over HTTP, from a server on this machine."""

import gzip
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nightshift.core.errors import DataError
from tasks.snapshot.sources import urls
from tasks.snapshot.sources.locations import read_offers

ROWS = b'{"text": "one"}\n' * 1000


class Handler(BaseHTTPRequestHandler):
    """Answers by the path of the request."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        headers = {"Content-Type": "application/octet-stream"}
        body, status = ROWS, 200
        if name.startswith("/to/"):
            status, body = 302, b""
            headers["Location"] = {
                "/to/signed.jsonl": "/rows.jsonl?X-Amz-Signature=hush",
                "/to/ftp.jsonl": "ftp://127.0.0.1/rows.jsonl?hush",
                "/to/file.jsonl": "file:///etc/hush.jsonl",
                "/to/gone.jsonl": "/gone.jsonl?token=hush",
                "/to/loop.jsonl": "/to/loop.jsonl",
            }[name]
        elif name == "/page.jsonl":
            headers["Content-Type"], body = "text/html; charset=utf-8", b"<html>log in</html>"
        elif name == "/gone.jsonl":
            status = 404
        elif name == "/busy.jsonl":
            status = 503
        elif name == "/empty.jsonl":
            status, body = 204, b""
        elif name == "/declared.jsonl.gz" or name == "/packed.jsonl":
            headers["Content-Encoding"], body = "gzip", gzip.compress(ROWS)
        elif name == "/slow.jsonl":
            self.server.wait.wait(10)  # type: ignore[attr-defined]
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body) + (5 if name == "/short.jsonl" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Start a server and return its URL."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.wait = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.wait.set()  # type: ignore[attr-defined]
    httpd.shutdown()


def read(location: str) -> tuple[str, str, bytes]:
    (offer,) = read_offers(location)
    return offer.name, offer.suffix, b"".join(offer.chunks)


def test_a_file_is_read_and_redirects_are_followed(server: str) -> None:
    assert read(f"{server}/a/my%20rows.jsonl") == ("my rows.jsonl", ".jsonl", ROWS)
    assert read(f"{server}/to/signed.jsonl") == ("signed.jsonl", ".jsonl", ROWS)


def test_a_compressed_file_stays_as_it_is_and_a_compressed_transfer_does_not(server: str) -> None:
    name, suffix, content = read(f"{server}/declared.jsonl.gz")
    assert (name, suffix, gzip.decompress(content)) == ("declared.jsonl.gz", ".jsonl.gz", ROWS)
    assert read(f"{server}/packed.jsonl")[2] == ROWS


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.jsonl?token=hush", "/gone.jsonl: the server answers 404 Not Found; correct the URL"),
        ("busy.jsonl", "/busy.jsonl: the server answers 503 Service Unavailable; "),
        ("empty.jsonl", "/empty.jsonl: the server answers 204 No Content; "),
        ("page.jsonl", "/page.jsonl: the server answers with a web page; use the URL of the file itself"),
        ("short.jsonl", "/short.jsonl: RemoteProtocolError after 16000 of 16005 bytes: "),
        ("to/ftp.jsonl", "/to/ftp.jsonl: UnsupportedProtocol after 0 of ? bytes: "),
        ("to/file.jsonl", "/to/file.jsonl: UnsupportedProtocol after 0 of ? bytes: "),
        ("to/gone.jsonl", "/to/gone.jsonl: the server answers 404 Not Found; "),
        ("to/loop.jsonl", "/to/loop.jsonl: TooManyRedirects after 0 of ? bytes: "),
        ("slow.jsonl", "/slow.jsonl: ReadTimeout after 0 of ? bytes: "),
    ],
)
def test_each_failure_is_one_line_without_secrets(
    path: str,
    message: str,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(urls, "TIMEOUT", 1.0)
    caplog.set_level(logging.INFO)
    with pytest.raises(DataError) as caught:
        read(f"{server}/{path}")
    assert str(caught.value).startswith(f"snapshot.sources: {server}{message}")
    assert len(str(caught.value).splitlines()) == 1
    assert "hush" not in str(caught.value) + caplog.text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_unreachable_server_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^snapshot\.sources: http://127\.0\.0\.1:9/a\.jsonl: ConnectError after"
    ):
        read("http://127.0.0.1:9/a.jsonl")


def test_no_request_is_logged_with_its_query(server: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    caplog.set_level(logging.INFO)
    read(f"{server}/to/signed.jsonl")
    assert "hush" not in caplog.text
