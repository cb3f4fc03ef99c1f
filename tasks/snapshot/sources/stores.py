"""Local files, and objects in object stores through fsspec."""

import glob
from collections.abc import Iterable, Iterator
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
        DataError: No file matches, or ingest cannot read one of them.
    """
    found = (Path(p) for p in glob.glob(location, recursive=True))  # noqa: PTH207 - absolute globs
    files = [path.as_posix() for path in found if path.is_file()]
    for name, suffix in require_readable(files, location):
        yield Offer(suffix, read_file(Path(name)))


def remote_offers(location: str) -> Iterator[Offer]:
    """Yield the objects of a URL, which may contain a glob, ordered by name.

    Credentials, region and endpoint come from the environment, as for the store's own tools.

    Raises:
        ConfigError: The store's library is not installed.
        DataError: The store rejects the request, no object matches, or ingest cannot read one of them.
    """
    import fsspec

    scheme = location.partition("://")[0]
    try:
        store, pattern = fsspec.url_to_fs(location)
    except ImportError as err:
        extra = EXTRAS[scheme]
        raise ConfigError(f"snapshot.sources: {location}: {err}; run `pip install -e '.[{extra}]'`") from err
    try:
        names = [name for name in store.glob(pattern) if store.isfile(name)]
    except (OSError, ValueError) as err:
        raise store_error(location, err) from err
    for name, suffix in require_readable(names, location):
        yield Offer(suffix, read_object(store, name))


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


def read_object(store: Any, name: str) -> Iterator[bytes]:
    """Yield the bytes of an object in a store.

    Raises:
        DataError: The store rejects the request.
    """
    try:
        with store.open(name, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (OSError, ValueError) as err:
        raise store_error(name, err) from err


def store_error(location: str, err: Exception) -> DataError:
    """Build the error for a request that a store rejected."""
    return DataError(
        f"snapshot.sources: {location}: {type(err).__name__}: {err}; check the location, and the credentials "
        "in the environment"
    )
