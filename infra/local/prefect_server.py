"""Run the Prefect server of the local stack behind a check of Host and Origin.

Prefect checks neither header, so any web page in a browser on this machine could call its API. Here a
request must have a loopback host, and its origin, if any, must be the server itself.
"""

import re
import sys
from typing import Any

import uvicorn
from prefect.server.api.server import create_app

from infra.local.processes import HOST
from nightshift.core.stage import build_parser

LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
REFUSED = b"Only requests from this machine and from Prefect's own UI are allowed."


def main() -> None:
    """Serve Prefect's API, UI and background services until SIGTERM."""
    parser = build_parser(sys.modules[__name__])
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    uvicorn.run(with_origin_check(create_app(final=True)), host=HOST, port=port, log_level="warning")


def with_origin_check(app: Any) -> Any:
    """Wrap an ASGI application in a check of Host and Origin, for HTTP and WebSocket."""

    async def check(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not is_local_request(scope["headers"]):
            await refuse(scope["type"], send)
        else:
            await app(scope, receive, send)

    return check


def is_local_request(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether a request has a loopback host and no foreign origin.

    Example:
        >>> is_local_request([(b"host", b"127.0.0.1:4200")])
        True
        >>> is_local_request([(b"host", b"localhost:4200"), (b"origin", b"http://localhost:4200")])
        True
        >>> is_local_request([(b"host", b"localhost:4200"), (b"origin", b"http://localhost:3000")])
        False
        >>> is_local_request([(b"host", b"evil.example:4200")])
        False
    """
    named = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    is_loopback = len(named) == 1 and LOOPBACK.fullmatch(named[0]) is not None
    return is_loopback and all(origin == f"http://{named[0]}" for origin in origins)


async def refuse(kind: str, send: Any) -> None:
    """Respond with 403, or close a WebSocket before it opens."""
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSED})


if __name__ == "__main__":
    main()
