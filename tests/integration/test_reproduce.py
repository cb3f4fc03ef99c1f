"""A version is rebuilt from the data in this checkout's DVC remote, with this checkout's settings."""

import shutil
from pathlib import Path

import pytest
from dvc.config import Config

from infra.cli.reproduce import fetch_data
from nightshift.pipeline.workspaces import clone
from tests.helpers.checkouts import ROOT, Checkout

GRAPH = """
stages:
  snapshot:
    cmd: mkdir -p data/raw data/benchmarks && echo raw > data/raw/1 && echo items > data/benchmarks/1
    outs: [data/raw, data/benchmarks]
"""
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid")


@pytest.fixture
def checkout(in_tmp: Path, clean_environment: dict[str, str]) -> Checkout:
    """Create a checkout whose data is only in its remote."""
    (in_tmp / "dvc.yaml").write_text(GRAPH)
    (in_tmp / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, in_tmp / ".dvc")
    made = Checkout(in_tmp, clean_environment)
    made.type("git", "init", "-q")
    made.type("dvc", "repro")
    made.type("dvc", "push")
    made.type(*GIT, "add", "-A")
    made.type(*GIT, "commit", "-qm", "a night")
    shutil.rmtree(in_tmp / ".dvc/cache")
    return made


def test_the_workspace_takes_its_data_from_the_remote_of_the_checkout(checkout: Checkout) -> None:
    assert "remote" not in checkout.type("git", "ls-files", ".dvc")
    checkout.type("dvc", "remote", "modify", "--local", "storage", "jobs", "2")
    folder = checkout.folder / ".nightshift/reproduce/nightshift-1"
    clone(folder, "HEAD")
    fetch_data(folder, ["data/raw", "data/benchmarks"])
    assert (folder / "data/raw/1").read_text() == "raw\n"
    assert (folder / "data/benchmarks/1").read_text() == "items\n"
    # Fetched once, for the checkout and all workspaces.
    assert (checkout.folder / ".dvc/cache/files").is_dir()
    # Settings that git does not have, such as credentials, apply too.
    assert Config(str(folder / ".dvc"))["remote"]["storage"]["jobs"] == 2
