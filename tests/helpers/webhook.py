"""A webhook that keeps what it gets, and Prefect's block that sends to it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from infra.local.settings import Stack


@contextmanager
def receiving() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a webhook, and the list of the bodies that it has received."""
    bodies: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()


def create_webhook(stack: Stack, name: str, url: str) -> None:
    """Create the notification block `custom-webhook/<name>`, which sends subject and body."""
    kind = stack.prefect("GET", "/block_types/slug/custom-webhook")["id"]
    schemas = {"block_schemas": {"block_type_id": {"any_": [kind]}}}
    block = {
        "name": name,
        "block_type_id": kind,
        "block_schema_id": stack.prefect("POST", "/block_schemas/filter", schemas)[0]["id"],
        "data": {"name": name, "url": url, "json_data": {"text": "{{subject}} {{body}}"}},
    }
    stack.prefect("POST", "/block_documents/", block)
