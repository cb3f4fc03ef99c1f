"""Fixtures: a checkout with a champion, and the single-process trainer inside the test process."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.files import read_json, write_json
from nightshift.core.paths import PACKED
from tests.helpers.sft import WHOLE_SET, make_folder, shipped_params

ROWS = ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Create a checkout whose only version is the champion, on a base with a 64-token context."""
    from tests.helpers.champion import make_champion

    folder = tmp_path_factory.mktemp("serving")
    base = shutil.copytree(tiny_base, tmp_path_factory.mktemp("short") / "base")
    write_json(base / "config.json", read_json(base / "config.json") | {"max_position_embeddings": 64})
    make_champion(folder, base)
    return folder


@pytest.fixture
def checkout(registered: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter the checkout with a champion; tests do not change it."""
    from tests.helpers.champion import enter

    enter(monkeypatch, registered)
    return registered


@pytest.fixture
def build(in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that builds the trainer with its self-tests in a separate folder."""
    from transformers import set_seed

    from tasks.sft import SftParams
    from tasks.sft.__main__ import build_job, prepare_rows
    from tasks.sft.machine import probe_machine
    from tasks.sft.proof import Proof
    from tasks.sft.rows import read_sizes
    from tasks.sft.worker import build_trainer

    make_folder(in_tmp, tiny_base, ROWS)
    monkeypatch.setattr("tasks.sft.__main__.probe_in_subprocess", probe_machine)

    def build_one(**changes: Any) -> Any:
        params = SftParams(**{**shipped_params(), **WHOLE_SET, **changes})
        sizes = read_sizes(PACKED)
        job = build_job(params, sizes)
        prepare_rows(job, sizes)
        proof = Proof(job)
        set_seed(params.seed)
        trainer = build_trainer(job, [proof])
        proof.trainer = trainer
        return trainer

    return build_one
