"""Location formats in params.yaml, and their readers.

| location | meaning |
|---|---|
| `package:<name>` | data inside an installed package |
| `s3://bucket/key`, `gs://bucket/key` | object store; the key may be a glob |
| `hub:<owner>/<name>@<commit>[/<glob>]` | Parquet files of a Hub dataset at a commit |
| `{sql: SELECT ..., url_env: NAME}` | rows of a query; the environment variable has the database URL |
| anything else | path or glob of local files |
"""

import re
from collections.abc import Iterator

from nightshift.core.config import StageParams
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.database import query_offer
from tasks.snapshot.sources.hub import HUB, hub_offers
from tasks.snapshot.sources.packages import PACKAGES, package_offer
from tasks.snapshot.sources.stores import EXTRAS, local_offers, remote_offers

ENVIRONMENT_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


class SqlQuery(StageParams):
    """A database query.

    Attributes:
        sql: One SELECT with ORDER BY: the same rows must always come in the same order.
        url_env: Environment variable with the SQLAlchemy URL of the database.
    """

    sql: str
    url_env: str


Location = str | SqlQuery


def require_location(location: str) -> None:
    """Validate the format of a location. An error quotes it only if it cannot contain a password.

    Raises:
        ValueError: The location is invalid.
    """
    if location.startswith("package:") and location.removeprefix("package:") not in PACKAGES:
        raise ValueError(f"{location!r} is unknown; known packages: {', '.join(PACKAGES)}")
    if location.startswith("hub:") and not HUB.fullmatch(location):
        raise ValueError(
            f"{location!r} must be hub:<owner>/<name>@<40 hex digits of a commit>, optionally with "
            "/<glob>; a branch may move"
        )
    scheme, found, rest = location.partition("://")
    if found and scheme not in EXTRAS:
        raise ValueError(
            f"scheme {scheme!r} is not supported; use s3:// or gs://, a path, or {{sql, url_env}}"
        )
    if found and not rest.strip("/"):
        raise ValueError(f"{location!r} names no bucket; write {scheme}://bucket/glob")
    if found and "@" in rest.split("/", 1)[0]:
        raise ValueError(f"{scheme}:// location contains credentials; set them in the environment")


def require_query(query: object) -> None:
    """Validate a query in params.yaml. An error quotes no value, which could contain a password.

    Raises:
        ValueError: A key is missing, unknown or invalid.
    """
    if not isinstance(query, dict) or query.keys() != {"sql", "url_env"}:
        raise ValueError("a query must have the keys sql and url_env, and no others")
    if not isinstance(query["url_env"], str) or not ENVIRONMENT_NAME.fullmatch(query["url_env"]):
        raise ValueError("url_env must be the name of an environment variable (A-Z, 0-9, _), not the URL")
    if not isinstance(query["sql"], str) or not re.search(r"\border\s+by\b", query["sql"], re.IGNORECASE):
        raise ValueError("sql needs ORDER BY: the same rows in another order would be a new shard each night")


def read_offers(location: Location) -> Iterator[Offer]:
    """Yield the files that a location currently offers.

    Raises:
        DataError: The location offers no file, or a file that ingest cannot read.
        ConfigError: A library or an environment variable is missing.
    """
    if isinstance(location, SqlQuery):
        yield query_offer(location.sql, location.url_env)
    elif location.startswith("package:"):
        yield package_offer(location.removeprefix("package:"))
    elif location.startswith("hub:"):
        yield from hub_offers(location)
    elif "://" in location:
        yield from remote_offers(location)
    else:
        yield from local_offers(location)
