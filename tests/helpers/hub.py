"""A Hugging Face Hub on the loopback interface: the endpoints for listing and downloading files."""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Contents of the Hub and the requests it received.

    Attributes:
        files: `models/owner/name` or `datasets/owner/name` -> path -> bytes, all at `COMMIT`.
        refusals: Repository, in the same form -> status and X-Error-Code of every response without the token.
        token: Access token that opens refused repositories; None for none.
        requests: Paths of all requests so far.
        url: Base URL of the Hub.
        branches: Revisions of every repository; all are at `COMMIT`.
    """

    files: Mapping[str, Mapping[str, bytes]]
    refusals: Mapping[str, tuple[int, str]]
    token: str | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""
    branches: tuple[str, ...] = (COMMIT, "main", "refs/convert/parquet")

    def answer(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        """Return status, error code and body for a path."""
        self.requests.append(path)
        is_open = self.token is not None and authorization == f"Bearer {self.token}"
        for repository, (status, code) in ({} if is_open else self.refusals).items():
            if repository.removeprefix("models/") in path:
                return status, code, b"{}"
        for repository, files in self.files.items():
            if path == f"/api/{repository}/tree/{COMMIT}":
                tree = [{"type": "file", "path": p, "size": len(b), "oid": p} for p, b in files.items()]
                return 200, "", json.dumps(tree).encode()
            if (found := re.fullmatch(f"/api/{repository}/revision/(.+)", path)) and (
                unquote(found[1]) in self.branches
            ):
                siblings = [{"rfilename": name} for name in files]
                identity = repository.partition("/")[2]
                return 200, "", json.dumps({"id": identity, "sha": COMMIT, "siblings": siblings}).encode()
            name = path.removeprefix(f"/{repository.removeprefix('models/')}/resolve/{COMMIT}/")
            if name in files:
                return 200, "", files[name]
            if path.startswith(f"/api/{repository}/"):
                return 404, "RevisionNotFound", b"{}"
        return 404, "RepoNotFound", b"{}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return this process's environment, pointed at this Hub with an empty cache in `home`."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
        }
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}


@contextmanager
def serve_hub(
    files: Mapping[str, Mapping[str, bytes]],
    refusals: Mapping[str, tuple[int, str]] | None = None,
    token: str | None = None,
) -> Iterator[Hub]:
    """Serve a Hub on a free port until the block ends."""
    hub = Hub(files, refusals or {}, token)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code, body = hub.answer(self.path.split("?")[0], self.headers.get("Authorization"))
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"'}
            for name, value in {**headers, "X-Error-Code": code}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None:
            """Suppress request logging."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
