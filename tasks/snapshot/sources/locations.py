"""Sources in params.yaml: locations with their options, and the readers of the locations.

| location | meaning |
|---|---|
| `package:<name>` | data inside an installed package |
| `s3://bucket/key`, `gs://bucket/key` | object store: an object, a folder or a glob |
| `https://host/path/file`, `http://...` | one file |
| `hub:<owner>/<name>@<commit>[/<glob>]` | Parquet files of a Hub dataset at a commit |
| anything else | local file, folder or glob; `~` is the home folder |

A source is a location; `{path: <location>, <options>}`; or `{sql: SELECT ..., url_env: NAME, <options>}`, the
rows of a query, where the environment variable contains the URL of the database.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nightshift.raw.options import SourceOptions
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.database import query_offer
from tasks.snapshot.sources.folders import local_offers
from tasks.snapshot.sources.hub import HUB, hub_offers
from tasks.snapshot.sources.packages import PACKAGES, package_offer
from tasks.snapshot.sources.stores import EXTRAS, remote_offers
from tasks.snapshot.sources.urls import SCHEMES, require_url, url_offer

ENVIRONMENT_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


class Source(SourceOptions):
    """A location, and the options of the source.

    Attributes:
        sql: One SELECT with ORDER BY: the same rows must always come in the same order.
        url_env: Environment variable with the SQLAlchemy URL of the database.
        path: Any other location.
    """

    sql: str | None = None
    url_env: str | None = None
    # Validated last, together with the others.
    path: Annotated[str | None, Field(validate_default=True)] = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            return {"path": value} if isinstance(value, str) else value
        raise ValueError(f"must be a location, or a mapping with `path` or `sql`, got {kind_of(value)}")

    @field_validator("sql", "url_env", "path", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"must be text, got {kind_of(value)}")
        return value

    @field_validator("sql")
    @classmethod
    def _is_ordered(cls, sql: str | None) -> str | None:
        if sql and not re.search(r"\border\s+by\b", sql, re.IGNORECASE):
            raise ValueError("needs ORDER BY: the same rows in another order would be a new shard each night")
        return sql

    @field_validator("url_env")
    @classmethod
    def _is_a_variable(cls, name: str | None) -> str | None:
        if name and not ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError("must be the name of an environment variable (A-Z, 0-9, _), not the URL")
        return name

    @field_validator("path")
    @classmethod
    def _is_one_location(cls, path: str | None, info: ValidationInfo) -> str | None:
        # An invalid value is missing from `data`, and reported already.
        sql, url_env = (info.data.get(key, "invalid") for key in ("sql", "url_env"))
        if (path is None) == (sql is None) or (sql is None) != (url_env is None):
            raise ValueError("a source needs either `path`, or both `sql` and `url_env`")
        if path:
            require_location(path)
        if info.data.get("split") and (sql or str(path).startswith("package:")):
            raise ValueError("`split` chooses among files, which this source does not have; remove it")
        return path

    def offers(self) -> Iterable[Offer]:
        """Return the files that the location currently offers, as `read_offers` does."""
        if self.sql and self.url_env:
            return [query_offer(self.sql, self.url_env)]
        return read_offers(str(self.path), self.split)


def kind_of(value: object) -> str:
    """Describe a value without quoting it: it could contain a password."""
    return f"a value of type {type(value).__name__}" if value else "nothing"


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
    if not found:
        return
    if scheme in SCHEMES:
        require_url(location)
        return
    if scheme not in EXTRAS:
        raise ValueError(
            f"scheme {scheme!r} is not supported; use https://, s3:// or gs://, a path, or {{sql, url_env}}"
        )
    if not rest.strip("/"):
        raise ValueError(f"{location!r} names no bucket; write {scheme}://bucket/glob")
    if "@" in rest.split("/", 1)[0]:
        raise ValueError(f"{scheme}:// location contains credentials; set them in the environment")


def read_offers(location: str, split: str | None = None) -> Iterator[Offer]:
    """Yield the files that a location currently offers, of one split or of all.

    Raises:
        DataError: The location offers no file or one that ingest cannot read, or a split has to be chosen.
        ConfigError: A library is missing.
    """
    if location.startswith("package:"):
        yield package_offer(location.removeprefix("package:"))
    elif location.startswith("hub:"):
        yield from hub_offers(location, split)
    elif location.partition("://")[0] in SCHEMES:
        yield url_offer(location)
    elif "://" in location:
        yield from remote_offers(location, split)
    else:
        yield from local_offers(location, split)
