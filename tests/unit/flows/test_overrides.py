"""Overrides apply to one run and are checked before anything changes."""

import os
import shutil
from pathlib import Path

import pytest

from flows.overrides import override_params
from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError, StageError
from nightshift.pipeline.params_yaml import edit
from tests.helpers.checkouts import ROOT


@pytest.fixture
def checkout(in_tmp: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp / name)
    return in_tmp


@pytest.fixture
def workspace(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a workspace of the checkout."""
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(checkout / ".nightshift"))
    folder = checkout / ".nightshift" / "workspaces" / "2026-01-31-00000001"
    folder.mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.chdir(folder)
    return folder


def test_an_override_applies_to_the_workspace_only(workspace: Path, checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with override_params({"sft.num_train_epochs": 3, "gate.seed": 9}):
        assert read_params()["sft"]["num_train_epochs"] == 3
        assert read_params()["gate"]["seed"] == 9
    assert (checkout / "params.yaml").read_bytes() == before


def test_an_override_keeps_comments_and_other_values(workspace: Path) -> None:
    before = (workspace / "params.yaml").read_text().splitlines()
    with override_params({"sft.num_train_epochs": 3}):
        after = (workspace / "params.yaml").read_text().splitlines()
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    assert changed == [("  num_train_epochs: 1", "  num_train_epochs: 3")]


def test_all_invalid_overrides_are_reported_at_once_and_nothing_changes(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    wrong = {"sft.num_train_epoch": 2, "gaet.seed": 1, "pack.max_length": "long"}
    with pytest.raises(ConfigError) as caught, override_params(wrong):
        pass
    text = str(caught.value)
    assert "sft.num_train_epoch: unknown key; did you mean num_train_epochs?" in text
    assert "gaet: unknown section; did you mean gate?" in text
    assert "pack.max_length: Input should be a valid integer, got 'long'" in text
    assert (checkout / "params.yaml").read_bytes() == before


def test_a_key_without_a_section_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"override 'seed': must be section\.key"):
        edit("sft: {seed: 1}", {"seed": 2})


def test_replacing_a_collection_keeps_the_comment_of_the_next_key() -> None:
    text = "a:\n  old:\n    x: 1\n    y: 2\n  # About next.\n  next: [1]\n  # About last.\n  last: 0\n"
    changed = edit(text, {"a.old": {"z": 3}, "a.next": ["p", "q"], "a.last": 1e-05})
    assert changed == (
        "a:\n  old:\n    z: 3\n  # About next.\n  next: [p, q]\n  # About last.\n  last: 1.0e-05\n"
    )
    emptied = edit(text, {"a.old": [], "a.next": {"k": 1}})
    assert emptied == "a:\n  old: []\n  # About next.\n  next: {k: 1}\n  # About last.\n  last: 0\n"


def test_overrides_without_a_workspace_are_an_error_and_change_nothing(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with (
        pytest.raises(ConfigError, match="use `nightshift run --overrides"),
        override_params({"gate.seed": 9}),
    ):
        pass
    assert (checkout / "params.yaml").read_bytes() == before


def test_a_second_run_in_the_checkout_is_rejected(checkout: Path) -> None:
    refused = rf"another run is active here \(pid {os.getpid()}\)"
    with override_params({}), pytest.raises(StageError, match=refused), override_params({}):
        pass


def test_runs_in_workspaces_do_not_exclude_each_other(workspace: Path, checkout: Path) -> None:
    with override_params({"gate.seed": 9}):
        os.chdir(checkout)
        with override_params({}):
            assert read_params()["gate"]["seed"] != 9
