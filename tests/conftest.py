"""Shared fixtures: tokenizer, small random model, clean environment and separate working folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkouts import BIN, ROOT

# pytest-xdist sets a terminal size for its workers, and every console created there would keep it.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a small Llama with random weights and the tokenizer of the demo's base model."""
    from tests.helpers.small_base import make_small_base

    return make_small_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a new user's shell plus the shared cache of compiled operators."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {key: os.environ[key] for key in kept if key in os.environ} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".nightshift" / "torch-extensions"),
        "HF_HUB_OFFLINE": "1",
        "DVC_NO_ANALYTICS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run the test in an empty folder with its own state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSHIFT_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return tmp_path
