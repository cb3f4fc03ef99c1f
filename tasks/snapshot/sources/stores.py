"""Objects in object stores, through fsspec."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from nightshift.core.errors import ConfigError, DataError
from nightshift.raw.formats import shard_suffix
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.folders import CHUNK, DESCRIPTIONS, fixed_part, ignore, require_readable
from tasks.snapshot.sources.splits import choose_split

# Scheme -> extra of this project that installs its fsspec file system.
EXTRAS = {"s3": "s3", "gs": "gcs"}


def remote_offers(location: str, split: str | None = None) -> Iterator[Offer]:
    """Yield the objects of a URL: an object, a folder or a glob, ordered by name.

    Credentials, region and endpoint come from the environment, as for the store's own tools.

    Raises:
        ConfigError: The store's library is not installed.
        DataError: The store cannot be reached or rejects the request, no object matches, none can be read, or
            a split has to be chosen.
    """
    import fsspec

    scheme = location.partition("://")[0]
    try:
        store, pattern = fsspec.url_to_fs(location)
    except ImportError as err:
        extra = EXTRAS[scheme]
        raise ConfigError(f"snapshot.sources: {location}: {err}; run `pip install -e '.[{extra}]'`") from err
    with explain_store_errors(location):
        objects, root = find_objects(store, pattern.rstrip("/"), location)
    names = {PurePosixPath(name).relative_to(root).as_posix(): name for name in objects}
    suffixes = require_readable(names, location)
    for name in choose_split(list(suffixes), split, location):
        url = f"{scheme}://{names[name]}"
        known = objects[names[name]]
        chunks = read_object(store, names[name], url)
        yield Offer(suffixes[name], chunks, name, version(url, known), changed(known))


def changed(known: Mapping[str, Any]) -> float | None:
    """Return when an object last changed, in seconds since 1970, as S3 (LastModified) or GCS (mtime) says."""
    moment = known.get("LastModified") or known.get("mtime")
    return moment.timestamp() if isinstance(moment, datetime) else None


def find_objects(store: Any, pattern: str, location: str) -> tuple[dict[str, Any], PurePosixPath]:
    """Return name -> description of the objects, and the folder that contains all of them.

    Raises:
        DataError: There is no such bucket.
    """
    # A listing of an earlier call in this process may be outdated.
    store.invalidate_cache()
    exact = "[" in pattern and store.isfile(pattern)
    found = {pattern: store.info(pattern)} if exact else store.glob(pattern, detail=True)
    bucket = pattern.partition("/")[0]
    if not found and bucket and not store.exists(bucket):
        raise DataError(
            f"snapshot.sources: {location}: there is no bucket {bucket!r}; correct the name, or the "
            "store's endpoint in the environment"
        )
    objects = {name: info for name, info in found.items() if info["type"] == "file"}
    for folder in found.keys() - objects.keys():
        listed = store.find(folder, detail=True)
        below = {name: info for name, info in listed.items() if is_visible(name.removeprefix(f"{folder}/"))}
        objects |= {name: info for name, info in below.items() if shard_suffix(name)}
        if others := [name for name in below if not shard_suffix(name)]:
            ignore(others, location)
    if pattern in objects:
        return objects, PurePosixPath(pattern).parent
    return objects, PurePosixPath(pattern) if pattern in found else fixed_part(PurePosixPath(pattern))


def is_visible(name: str) -> bool:
    """Return whether an object below a folder is neither hidden nor a description of a data set.

    Example:
        >>> is_visible("a/b.jsonl"), is_visible(".cache/b.jsonl"), is_visible("a/dataset_info.json")
        (True, False, False)
    """
    *folders, base = name.split("/")
    hidden = not base or any(part.startswith(".") for part in (*folders, base))
    return not hidden and base not in {*DESCRIPTIONS, "state.json"}


def version(url: str, info: dict[str, Any]) -> str | None:
    """Return what changes whenever an object changes, if the store says it."""
    tag = info.get("ETag") or info.get("etag")
    return f"{url} {tag} {info.get('size')}" if tag else None


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
