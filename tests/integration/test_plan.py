"""`nightshift plan` on a folder: what it says, and that it needs no torch to say it."""

import subprocess
import sys
from pathlib import Path

import yaml

from tests.checkouts import ROOT
from tests.sft import make_folder, shipped_params

PROGRAM = """
import sys
from infra.cli import app
app(["plan"], standalone_mode=False)
print("torch" in sys.modules)
"""


def plan(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    section = {**shipped_params(), "strategy": "auto", "precision": "fp32", "warmup_steps": 0}
    (folder / "params.yaml").write_text(yaml.safe_dump({"sft": section}), encoding="utf-8")
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    more = {"PYTHONPATH": str(ROOT), "NIGHTSHIFT_HOME": str(folder / "state"), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**environment, **more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_plan_is_printed_without_torch(
    tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str]
) -> None:
    done = plan(make_folder(tmp_path, tiny_base, ((0, 1), (2, 3), (4, 5))), clean_environment)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    # Two processes, so two steps of two rows; the lengths of the six examples are 9, 31, 14, 40, 22, 27.
    assert "steps 2 of 2 rows tokens 143 supervised tokens 73" in said
    assert "time unknown" in said
    assert "largest micro-batch: 54 tokens, 27 of them with labels" in said
    for strategy in ("single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"):
        assert f" {strategy} " in said
    assert "micro-batch 1 rows" in said
    assert "dvc status: ERROR: you are not inside of a DVC repository" in said
    assert said.endswith("False")
    assert (tmp_path / "state" / "plan.svg").read_text(encoding="utf-8").startswith("<svg")


def test_rows_that_are_not_there_yet_are_named(
    tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str]
) -> None:
    folder = make_folder(tmp_path, tiny_base)
    (folder / "data" / "pack" / "train.parquet").unlink()
    done = plan(folder, clean_environment)
    assert "error: data/pack/train.parquet: not found; run `dvc repro pack` first" in done.stderr
