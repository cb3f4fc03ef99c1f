"""Rows of a database query as JSON Lines. The URL with its password stays in the environment."""

import json
import os
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from urllib.parse import quote, quote_plus
from uuid import UUID

from nightshift.core.errors import ConfigError, DataError
from tasks.snapshot.sources import Offer

ROWS_PER_CHUNK = 5_000
# Driver module -> PyPI package, where the names differ.
DRIVERS = {"MySQLdb": "mysqlclient", "mysql": "mysql-connector-python"}


def query_offer(sql: str, url_env: str) -> Offer:
    """Return the rows of a query as an offer.

    Args:
        sql: One SELECT statement.
        url_env: Environment variable with the SQLAlchemy URL of the database.

    Raises:
        ConfigError: The variable is not set.
    """
    url = os.environ.get(url_env)
    if not url:
        raise ConfigError(
            f"snapshot.sources: {url_env}: not set; set this variable to the URL of the database"
        )
    return Offer(".jsonl", read_query(sql, url, url_env), "query")


def read_query(sql: str, url: str, url_env: str) -> Iterator[bytes]:
    """Run a query and yield its rows as JSON Lines with sorted keys. Nothing is committed.

    Raises:
        ConfigError: The URL is invalid, or its driver is not installed.
        DataError: The database rejects the query, or a value has no JSON form.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        engine = create_engine(url)
    except ModuleNotFoundError as err:
        driver = DRIVERS.get(err.name or "", err.name)
        raise ConfigError(
            f"snapshot.sources: {url_env} needs the driver {err.name}; run `pip install {driver}`"
        ) from err
    # The message of this error and of its causes may contain the URL.
    except (ArgumentError, ValueError):
        raise ConfigError(
            f"snapshot.sources: {url_env}: not a valid SQLAlchemy URL; use dialect://user:password@host/name"
        ) from None
    try:
        with engine.connect() as connection:
            # no_parameters: a % in the query is not a placeholder.
            streaming = connection.execution_options(stream_results=True, no_parameters=True)
            result = streaming.exec_driver_sql(sql)
            if not result.returns_rows:
                raise DataError(
                    f"snapshot.sources: {url_env}: the query returns no rows; use a single SELECT"
                )
            for rows in result.mappings().partitions(ROWS_PER_CHUNK):
                yield "".join(_line(dict(row)) for row in rows).encode()
    except SQLAlchemyError as err:
        cause = getattr(err, "orig", None) or err
        message = f"{type(cause).__name__}: {without_secrets(str(cause), engine.url)}"
        raise DataError(
            f"snapshot.sources: {url_env}: {message}; check the query, the URL and the user's permissions"
        ) from None
    except TypeError as err:
        raise DataError(f"snapshot.sources: {url_env}: {err}; cast the column in the query") from err
    finally:
        engine.dispose()


def without_secrets(message: str, url: Any) -> str:
    """Mask the password and the options of the URL, plain or URL-encoded, in a driver's message.

    Example:
        >>> from sqlalchemy import make_url
        >>> without_secrets("no a@b for key=hush", make_url("x://me:a%40b@host/db?key=hush"))
        'no *** for key=***'
    """
    options = [value for values in url.normalized_query.values() for value in values]
    for secret in (url.password or "", *options):
        for written in (secret, quote(secret, safe=""), quote_plus(secret)):
            message = message.replace(written, "***") if written else message
    return message


def _line(row: dict[str, Any]) -> str:
    """Format one row as a line of JSON."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=_text) + "\n"


def _text(value: object) -> str:
    """Convert a value without a JSON type to text.

    Raises:
        TypeError: The type has no standard text form.
    """
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be converted to JSON")
