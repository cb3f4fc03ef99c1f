"""Local files, and objects in object stores through fsspec."""

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightshift.core.errors import ConfigError, DataError
from nightshift.raw.formats import READABLE, shard_suffix
from tasks.snapshot.sources import Offer

CHUNK = 4 * 2**20
# Scheme -> extra of this project that installs its fsspec file system.
EXTRAS = {"s3": "s3", "gs": "gcs"}


def local_offers(location: str) -> Iterator[Offer]:
    """Yield the files of a path or glob, ordered by name.

    Raises:
        DataError: No file matches, it is a folder, or ingest cannot read one of them.
    """
    if Path(location).is_dir():
        raise folder_error(location)
    found = (Path(p) for p in glob.glob(location, recursive=True))  # noqa: PTH207 - absolute globs
    files = [path.as_posix() for path in found if path.is_file()]
    for name, suffix in require_readable(files, location):
        yield Offer(suffix, read_file(Path(name)))


def remote_offers(location: str) -> Iterator[Offer]:
    """Yield the objects of a URL, which may contain a glob, ordered by name.

    Credentials, region and endpoint come from the environment, as for the store's own tools.

    Raises:
        ConfigError: The store's library is not installed.
        DataError: The store cannot be reached or rejects the request, no object matches, it is a folder, or
            ingest cannot read one of them.
    """
    import fsspec

    scheme = location.partition("://")[0]
    try:
        store, pattern = fsspec.url_to_fs(location)
    except ImportError as err:
        extra = EXTRAS[scheme]
        raise ConfigError(f"snapshot.sources: {location}: {err}; run `pip install -e '.[{extra}]'`") from err
    bucket = pattern.partition("/")[0]
    with explain_store_errors(location):
        found = store.glob(pattern, detail=True)
        names = [name for name, info in found.items() if info["type"] == "file"]
        if not names and store.isdir(pattern):
            raise folder_error(location)
        if not names and bucket and not store.exists(bucket):
            raise DataError(
                f"snapshot.sources: {location}: there is no bucket {bucket!r}; correct the name, or the "
                "store's endpoint in the environment"
            )
    for name, suffix in require_readable(names, location):
        yield Offer(suffix, read_object(store, name, f"{scheme}://{name}"))


def require_readable(names: Iterable[str], location: str) -> list[tuple[str, str]]:
    """Return (name, suffix) of the files, sorted by name.

    Raises:
        DataError: There are no files, or ingest cannot read one of them.
    """
    found = [(name, shard_suffix(name)) for name in sorted(names)]
    if not found:
        raise DataError(f"snapshot.sources: {location} matches no file; correct the path or glob")
    for name, suffix in found:
        if suffix is None:
            raise DataError(f"snapshot.sources: {name}: unknown format; use {READABLE}, or a narrower glob")
    return [(name, suffix) for name, suffix in found if suffix]


def read_file(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a local file."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def read_object(store: Any, name: str, url: str) -> Iterator[bytes]:
    """Yield the bytes of an object in a store.

    Raises:
        DataError: The store cannot be reached or rejects the request.
    """
    with explain_store_errors(url), store.open(name, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


@contextmanager
def explain_store_errors(location: str) -> Iterator[None]:
    """Turn an error of a store in the block into an error with a fix.

    Raises:
        DataError: The store cannot be reached or rejects the request, or credentials are missing.
    """
    try:
        yield
    except store_errors(location.partition("://")[0]) as err:
        message = " ".join(str(err).split())
        raise DataError(
            f"snapshot.sources: {location}: {type(err).__name__}: {message}; check the location, the "
            "network, and the store's credentials and endpoint in the environment"
        ) from err


def store_errors(scheme: str) -> tuple[type[Exception], ...]:
    """Return the exceptions of a store's library for credentials, requests and connections."""
    if scheme == "s3":
        from botocore.exceptions import BotoCoreError, ClientError

        return OSError, ValueError, BotoCoreError, ClientError
    if scheme == "gs":
        from aiohttp import ClientError as ConnectionFailure
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        return OSError, ValueError, GoogleAuthError, HttpError, ConnectionFailure
    return OSError, ValueError


def folder_error(location: str) -> DataError:
    """Build the error for a folder where files are expected."""
    folder = location.rstrip("/")
    return DataError(f"snapshot.sources: {location} is a folder; add a glob, such as {folder}/*.jsonl")
