"""Call a Prefect server over HTTP, since Prefect's own client takes seconds to import."""

import base64
import http
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from typing import Any

from nightshift.core.errors import StageError
from nightshift.core.state import state_dir

# After an outage, the server of a busy machine responds slowly.
BUSY_SECONDS = 120
CLIENT = str(uuid.uuid4())
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # bypasses the user's proxy
log = logging.getLogger(__name__)


class UnreachableError(StageError):
    """The Prefect server does not respond, or has an internal error."""


def call(url: str, auth_string: str, method: str, path: str, body: object = None) -> Any:
    """Call Prefect's API and return its decoded JSON response, or None if the response is not JSON.

    Args:
        url: URL of the API.
        auth_string: Credentials, `user:password`.
        method: HTTP method; all except GET need a CSRF token, which the server issues to this process.
        path: Path below the URL.
        body: Request body, sent as JSON.

    Raises:
        UnreachableError: The server does not respond.
        StageError: The server rejects the request.
    """
    headers = {"Authorization": f"Basic {base64.b64encode(auth_string.encode()).decode()}"}
    if method == "GET":
        return request(method, f"{url}{path}", body, headers)
    address = f"{url}/csrf-token?client={CLIENT}"
    token = request("GET", address, headers=headers, timeout=BUSY_SECONDS)["token"]
    headers |= {"Prefect-Csrf-Client": CLIENT, "Prefect-Csrf-Token": token}
    return request(method, f"{url}{path}", body, headers, BUSY_SECONDS)


def request(
    method: str,
    url: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> Any:
    """Send a request and return its decoded JSON response, or None if the response is not JSON.

    Args:
        method: HTTP method.
        url: URL of the request.
        body: Request body, sent as JSON.
        headers: Additional headers.
        timeout: Timeout of the response, in seconds.

    Raises:
        UnreachableError: The server does not respond.
        StageError: The server rejects the request.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, headers, method=method)
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with DIRECT.open(request, timeout=timeout) as answer:
                text = answer.read()
                return json.loads(text) if "json" in answer.headers.get_content_type() else None
        except (OSError, http.client.HTTPException) as err:
            code = err.code if isinstance(err, urllib.error.HTTPError) else None
            # Prefect returns 503 if the client should retry: its database was locked.
            if code != http.HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                is_rejected = code is not None and code < http.HTTPStatus.INTERNAL_SERVER_ERROR
                kind = StageError if is_rejected else UnreachableError
                raise kind(f"{method} {url}: {err}; see the logs in {state_dir()}") from err
            log.info("%s is busy; retrying", url)
            time.sleep(1)
