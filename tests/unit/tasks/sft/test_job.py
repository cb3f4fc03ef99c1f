"""Ranks read what the stage writes: every value, bit-identical, and nothing else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.sft.job import read_job
from tasks.sft.plan import Plan
from tests.helpers.sft import make_job, sft_params


@given(rates=st.lists(st.floats(0, 1), min_size=1))
def test_a_job_is_read_back_unchanged(tmp_path_factory: pytest.TempPathFactory, rates: list[float]) -> None:
    file = tmp_path_factory.mktemp("job") / "job.json"
    ones = [1] * len(rates)
    plan = Plan(len(rates), 1, 0, ones, ones, ones, rates)
    params = sft_params(activation_checkpointing=False, num_processes=2)
    job = make_job(params, devices=("GPU-1", "3"), strategy="zero2").model_copy(update={"plan": plan})
    job.write(file)
    assert read_job(file) == job


def test_a_job_of_another_version_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    make_job(sft_params()).write(file)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "deepspeed": True}))
    with pytest.raises(ValidationError, match="deepspeed"):
        read_job(file)
