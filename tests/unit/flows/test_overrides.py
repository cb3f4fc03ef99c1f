"""Overrides apply to one run and are checked before anything changes."""

import os
import shutil
import subprocess
import sys
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


def test_an_override_applies_only_during_the_run(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with override_params({"sft.num_train_epochs": 3, "gate.seed": 9}):
        assert read_params()["sft"]["num_train_epochs"] == 3
        assert read_params()["gate"]["seed"] == 9
    assert (checkout / "params.yaml").read_bytes() == before


def test_an_override_keeps_comments_and_other_values(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_text().splitlines()
    with override_params({"sft.num_train_epochs": 3}):
        after = (checkout / "params.yaml").read_text().splitlines()
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


def test_the_next_run_reverts_the_overrides_of_a_killed_run(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    kill_within_overrides()
    assert "seed: 9" in params.read_text()
    with override_params({}):
        assert params.read_text() == before


def kill_within_overrides() -> None:
    program = (
        "import os; from flows.overrides import override_params; "
        "held = override_params({'gate.seed': 9}); held.__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


def halve_learning_rate(text: str) -> str:
    changed = text.replace("  learning_rate: 1.0e-3", "  learning_rate: 5.0e-4")
    assert changed != text
    return changed


def test_an_edit_during_a_run_is_kept_and_reported(checkout: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    with override_params({"sft.num_train_epochs": 3, "gate.seed": 9}):
        params.write_text(halve_learning_rate(params.read_text()))
    assert params.read_text() == halve_learning_rate(before)
    assert "params.yaml was edited during a run with overrides" in caplog.text


def test_an_edit_of_the_overridden_line_itself_is_kept(checkout: Path) -> None:
    params = checkout / "params.yaml"
    with override_params({"sft.num_train_epochs": 3, "gate.seed": 9}):
        params.write_text(params.read_text().replace("num_train_epochs: 3", "num_train_epochs: 5  # mine: ü"))
    assert read_params()["sft"]["num_train_epochs"] == 5
    assert read_params()["gate"]["seed"] != 9
    assert "# mine: ü" in params.read_text()


def test_an_edit_back_to_the_original_is_kept(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_bytes()
    with override_params({"gate.seed": 9}):
        params.write_bytes(before)
    assert params.read_bytes() == before


def test_an_edit_after_a_kill_is_kept_by_the_next_run(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    kill_within_overrides()
    params.write_text(halve_learning_rate(params.read_text()))
    with override_params({}):
        assert params.read_text() == halve_learning_rate(before)


def test_overrides_of_a_killed_run_of_an_earlier_version_are_reverted(checkout: Path) -> None:
    params = checkout / "params.yaml"
    before = params.read_text()
    kept = checkout / ".nightshift/params.before-overrides.yaml"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(before)
    params.write_text(before.replace("num_train_epochs: 1", "num_train_epochs: 7"))
    with override_params({}):
        assert params.read_text() == before
    assert not kept.exists()


@pytest.mark.parametrize("second", [{"gate.seed": 8}, {}])
@pytest.mark.parametrize("first", [{"gate.seed": 9}, {}])
def test_a_second_run_in_the_checkout_is_rejected_and_changes_nothing(
    first: dict[str, object], second: dict[str, object], checkout: Path
) -> None:
    params = checkout / "params.yaml"
    before = params.read_bytes()
    refused = rf"another run is active here \(pid {os.getpid()}\)"
    with override_params(first):
        during = params.read_bytes()
        with pytest.raises(StageError, match=refused), override_params(second):
            pass
        assert params.read_bytes() == during
    assert params.read_bytes() == before
    with override_params(second):
        pass
