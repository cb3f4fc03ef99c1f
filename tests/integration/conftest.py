"""A fixture that builds the single-process trainer inside the test process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.paths import PACKED
from tests.helpers.sft import WHOLE_SET, make_folder, shipped_params

ROWS = ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.fixture
def build(in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that builds the trainer with its self-tests in a separate folder."""
    from transformers import set_seed

    from nightshift.core.files import read_rows
    from tasks.sft import SftParams
    from tasks.sft.__main__ import build_job
    from tasks.sft.machine import probe_machine
    from tasks.sft.proof import Proof
    from tasks.sft.worker import build_trainer

    make_folder(in_tmp, tiny_base, ROWS)
    monkeypatch.setattr("tasks.sft.__main__.probe_in_subprocess", probe_machine)

    def build_one(**changes: Any) -> Any:
        params = SftParams(**{**shipped_params(), **WHOLE_SET, **changes})
        job = build_job(params, read_rows(PACKED))
        proof = Proof(job)
        set_seed(params.seed)
        trainer = build_trainer(job, [proof])
        proof.trainer = trainer
        return trainer

    return build_one
