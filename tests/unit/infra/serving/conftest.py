"""The API of a small random model."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from infra.local.origin import with_origin_check
from infra.serving.api import build_app
from infra.serving.engine import Engine
from infra.serving.model import Served


@pytest.fixture
def engine(lively: tuple[Any, Any]) -> Engine:
    return Engine(Served("nightshift", 3, 1_700_000_000, *lively))


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    """Return a client of the API as it is served."""
    with TestClient(with_origin_check(build_app(engine)), "http://127.0.0.1:8000") as client:
        yield client
