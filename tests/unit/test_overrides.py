"""Overrides hold for one run, and are checked before anything changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.overrides import applied, edit
from tasks.config import read_params
from tasks.errors import ConfigError
from tests.checkouts import ROOT


@pytest.fixture
def checkout(in_tmp: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp / name)
    return in_tmp


def test_an_override_holds_within_the_run_only(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with applied({"sft.num_train_epochs": 3, "gate.seed": 9}):
        assert read_params()["sft"]["num_train_epochs"] == 3
        assert read_params()["gate"]["seed"] == 9
    assert (checkout / "params.yaml").read_bytes() == before


def test_comments_and_other_values_stay_while_an_override_holds(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_text().splitlines()
    with applied({"sft.num_train_epochs": 3}):
        after = (checkout / "params.yaml").read_text().splitlines()
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    assert changed == [("  num_train_epochs: 1", "  num_train_epochs: 3")]


def test_all_wrong_overrides_are_told_at_once_and_nothing_changes(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    wrong = {"sft.num_train_epoch": 2, "gaet.seed": 1, "pack.max_length": "long"}
    with pytest.raises(ConfigError) as caught, applied(wrong):
        pass
    text = str(caught.value)
    assert "sft.num_train_epoch: unknown key; did you mean num_train_epochs?" in text
    assert "gaet: unknown section; did you mean gate?" in text
    assert "pack.max_length: Input should be a valid integer, got 'long'" in text
    assert (checkout / "params.yaml").read_bytes() == before


def test_a_key_without_a_section_is_told() -> None:
    with pytest.raises(ConfigError, match=r"override 'seed': must be section\.key"):
        edit("sft: {seed: 1}", {"seed": 2})


def test_a_collection_leaves_the_comment_of_the_next_key_in_its_place() -> None:
    text = "a:\n  old:\n    x: 1\n    y: 2\n  # About next.\n  next: [1]\n  # About last.\n  last: 0\n"
    changed = edit(text, {"a.old": {"z": 3}, "a.next": ["p", "q"], "a.last": 1e-05})
    assert changed == (
        "a:\n  old:\n    z: 3\n  # About next.\n  next: [p, q]\n  # About last.\n  last: 1.0e-05\n"
    )
    emptied = edit(text, {"a.old": [], "a.next": {"k": 1}})
    assert emptied == "a:\n  old: []\n  # About next.\n  next: {k: 1}\n  # About last.\n  last: 0\n"


def test_what_a_killed_run_left_is_put_right_by_the_next(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    program = (
        "import os; from flows.overrides import applied; "
        "held = applied({'gate.seed': 9}); held.__enter__(); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert "seed: 9" in params.read_text()
    with applied({}):
        assert params.read_text() == before
