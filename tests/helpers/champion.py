"""A checkout with registered versions, for tests that use them."""

from pathlib import Path

import pytest

from nightshift.core.files import read_json, write_json, write_rows
from nightshift.data.schemas import ALL_SCORES
from nightshift.registry import card, versions
from tasks import register
from tests.helpers.checkouts import ROOT
from tests.integration.test_registry import candidate, make_checkout

GATE = {
    "verdict": "promote",
    "reason": "gain: better: +30.0% accuracy",
    "reference": "base",
    "loss": 2.25,
    "reference_loss": 3.0,
    "checks": [{"name": "gain", "verdict": "promote", "message": "better: +30.0% accuracy"}],
}


def make_champion(folder: Path, base: Path) -> None:
    """Create a checkout as it is after the gate, whose only version is the champion."""
    make_checkout(folder, base)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        item = {"slice": "s", "tokens": None, "choices": 4, "status": "ok"}
        rows = [
            {"model": model, "benchmark": "facts", "item": str(i), "score": float(i < right), **item}
            for model, right in (("base", 3), ("candidate", 6))
            for i in range(10)
        ]
        write_rows(card.SCORES, rows, ALL_SCORES)
        versions.write_champion(folder / "data" / "champion")
        register_champion(1)


def enter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Enter a checkout with its own state."""
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(ROOT))
    for name in ("NIGHTSHIFT_HOME", "NIGHTSHIFT_BASE", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        patch.delenv(name, raising=False)


def register_champion(seed: int) -> None:
    """Register an adapter and make it champion."""
    candidate(seed)
    write_json(register.GATE, GATE)
    register.main()
    client, name = versions.open_registry()
    client.set_registered_model_alias(name, "champion", str(read_json(register.VERSION)["version"]))
