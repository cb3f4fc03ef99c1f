"""Check Host and Origin of every request to a server on this machine.

Binding to loopback is not enough: any web page in a browser on this machine can reach the server, and
through DNS rebinding also under another host name. A request must have an allowed host, and its origin,
if any, must be the server itself.
"""

import re
from collections.abc import Collection
from typing import Any

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
REFUSED = b"Only requests to this server's own address are allowed, and none from other web pages."


def with_origin_check(app: Any, hosts: Collection[str] = LOOPBACK) -> Any:
    """Wrap an ASGI application in a check of Host and Origin, for HTTP and WebSocket.

    Args:
        app: ASGI application.
        hosts: Allowed hosts, without port.
    """

    async def check(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not is_own_request(scope["headers"], hosts):
            await refuse(scope["type"], send)
        else:
            await app(scope, receive, send)

    return check


def is_own_request(headers: list[tuple[bytes, bytes]], hosts: Collection[str] = LOOPBACK) -> bool:
    """Return whether a request has an allowed host and no foreign origin.

    Example:
        >>> is_own_request([(b"host", b"127.0.0.1:4200")])
        True
        >>> is_own_request([(b"host", b"localhost:4200"), (b"origin", b"http://localhost:4200")])
        True
        >>> is_own_request([(b"host", b"localhost:4200"), (b"origin", b"http://localhost:3000")])
        False
        >>> is_own_request([(b"host", b"evil.example:4200")])
        False
    """
    named = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    is_allowed = len(named) == 1 and re.sub(r":\d+$", "", named[0]) in hosts
    return is_allowed and all(origin == f"http://{named[0]}" for origin in origins)


async def refuse(kind: str, send: Any) -> None:
    """Respond with 403, or close a WebSocket before it opens."""
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSED})
