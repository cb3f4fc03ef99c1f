"""A DVC remote over HTTP that can be told to fail."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Remote(ThreadingHTTPServer):
    """A server on a free port of the loopback address that stores what it gets below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Status of every answer, 0 for none at all; None for a remote that works.
        self.failure: int | None = None
        folder.mkdir(parents=True)
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """URL of the remote."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def failing(self, status: int) -> Iterator[None]:
        """Answer every request with a status; 0 closes the connection without an answer."""
        self.failure = status
        try:
            yield
        finally:
            self.failure = None

    def close(self) -> None:
        """Stop the server."""
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """GET, HEAD and PUT of files."""

    protocol_version = "HTTP/1.1"
    server: Remote

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def file(self) -> Path | None:
        """Return the file that is asked for; None if the remote fails, which is then answered."""
        if (failure := self.server.failure) is None:
            return self.server.folder / unquote(self.path).lstrip("/")
        self.close_connection = True
        if failure:
            self.answer(failure)
        return None

    def answer(self, status: int, data: bytes = b"") -> None:
        """Send a status and data, but for HEAD only its length."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        """Send a file."""
        if file := self.file():
            self.answer(200, file.read_bytes()) if file.is_file() else self.answer(404)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def do_PUT(self) -> None:
        """Store a file."""
        data = self.read()
        if file := self.file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            self.answer(201)

    def read(self) -> bytes:
        """Return the body of the request, which DVC sends in chunks."""
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data
