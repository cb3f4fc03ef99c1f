"""One file at a URL, over HTTP. Neither logs nor errors contain a query or the target of a redirect."""

import logging
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import httpx

from nightshift.core.errors import DataError
from nightshift.raw.formats import READABLE, shard_suffix, split_suffix
from tasks.snapshot.sources import Offer

SCHEMES = ("https", "http")
# Seconds without a connection or without any data.
TIMEOUT = 60.0
# Parts of the names of query parameters that grant access, such as X-Amz-Signature.
SECRETS = ("token", "sig", "key", "secret", "password", "auth", "credential")


def require_url(location: str) -> None:
    """Validate a URL. An error quotes it only if it cannot contain a secret.

    Raises:
        ValueError: It is malformed, contains credentials, or names no file that ingest can read.
    """
    try:
        url = urlsplit(location)
        host, is_open = url.hostname, url.port is None or url.port > 0
    except ValueError as err:
        raise ValueError(f"not a valid URL: {err}") from err
    if url.username or url.password:
        raise ValueError(f"the {url.scheme}:// location contains credentials; {WITHOUT}")
    for name, _ in parse_qsl(url.query, keep_blank_values=True):
        if any(word in name.lower() for word in SECRETS):
            raise ValueError(f"the query of the URL contains {name!r}, which looks like a secret; {WITHOUT}")
    if not host or not is_open:
        raise ValueError(f"{without_query(url)!r} names no host; write {url.scheme}://host/path/file.jsonl")
    if not shard_suffix(file_name(url)):
        raise ValueError(f"{without_query(url)!r} has no known format; its path must end in {READABLE}")


WITHOUT = "download the file, or use s3://, gs:// or hub:, which take credentials from the environment"


def url_offer(location: str) -> Offer:
    """Return the file at a URL as an offer."""
    url = urlsplit(location)
    suffix = shard_suffix(file_name(url)) or ""
    return Offer(suffix, read_url(location, suffix), file_name(url))


def read_url(location: str, suffix: str) -> Iterator[bytes]:
    """Yield the bytes of the file at a URL; redirects are followed to http and https only.

    Raises:
        DataError: The server cannot be reached, answers with an error or a web page, or ends early.
    """
    # Its messages contain the URLs of redirects, which may be signed.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    where = f"snapshot.sources: {without_query(urlsplit(location))}"
    received = 0
    total = "?"
    try:
        with httpx.stream(
            "GET", location, follow_redirects=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}
        ) as response:
            require_file(response, where)
            total = response.headers.get("Content-Length", "?")
            # Some servers declare the compression of a .gz file as that of the transfer.
            is_compressed = split_suffix(suffix)[1] is not None
            for chunk in response.iter_raw() if is_compressed else response.iter_bytes():
                received += len(chunk)
                yield chunk
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as err:
        raise DataError(
            f"{where}: {type(err).__name__} after {received} of {total} bytes: {reason(err)}; check the URL "
            "and the network, then run again"
        ) from None


def require_file(response: httpx.Response, where: str) -> None:
    """Check that a response contains the file.

    Raises:
        DataError: It is an error, or a web page such as a login form.
    """
    if response.status_code != 200:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        raise DataError(f"{where}: the server answers {status}; correct the URL, or ask for access")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise DataError(f"{where}: the server answers with a web page; use the URL of the file itself")


def reason(err: Exception) -> str:
    """Return the message of an error in one line; the host of a redirect may differ from the location's."""
    return " ".join(str(err).split()) or "no answer"


def file_name(url: SplitResult) -> str:
    """Return the last part of the path of a URL."""
    return PurePosixPath(unquote(url.path)).name


def without_query(url: SplitResult) -> str:
    """Return a URL without query and fragment."""
    return url._replace(query="", fragment="").geturl()
