"""Random valid combinations of the section sft train for three steps, and every choice has an effect."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkouts import ROOT
from tests.helpers.fuzz import EFFECTIVE, make_pairs


@pytest.mark.parametrize(
    ("count", "seed"), [(3, 0), *(pytest.param(20, seed, marks=pytest.mark.long) for seed in range(1, 6))]
)
def test_valid_combinations_train_and_no_choice_is_without_effect(
    tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str], count: int, seed: int
) -> None:
    """The long form runs 200 combinations: 5 x 20 pairs that differ in one choice."""
    pairs = list(make_pairs(count, seed))
    cases = [changes for _, *both in pairs for changes in both]
    request = {"base": str(tiny_base), "folder": str(tmp_path), "cases": cases}
    environment = {**clean_environment, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.fuzz"],
        input=json.dumps(request),
        text=True,
        check=True,
        env=environment | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        timeout=3000,
    )
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    faults = [
        f"{name}: {changes}: {outcome['output']}"
        for (name, changes), outcome in zip(
            ((name, changes) for name, *both in pairs for changes in both), outcomes, strict=True
        )
        if outcome["traceback"] or outcome["code"]
    ]
    assert not faults, "\n\n".join(faults)
    for (name, before, after), one, two in zip(pairs, outcomes[::2], outcomes[1::2], strict=True):
        assert one["seen"] != two["seen"] or is_unused(name, two["effective"]), (name, before, after)


def is_unused(name: str, effective: dict[str, Any]) -> bool:
    """Return whether effective.json says that all changed parameters of a choice have no effect."""
    keys = {key for changes in EFFECTIVE[name] for key in changes}
    return all(effective[key]["effective"] is None for key in keys)
