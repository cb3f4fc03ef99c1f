"""`nightshift plan` in a folder: its output and refusals, without loading torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.files import read_rows, write_rows
from nightshift.pipeline.leases import lease
from tasks.pack import ROWS
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import make_folder

PROGRAM = """
import sys
from infra.cli.app import app
app(["plan"], standalone_mode=False)
print("torch" in sys.modules)
"""


def write_params(folder: Path, section: str = "sft", **changes: Any) -> None:
    """Write the shipped parameters with fixed sft values and some changes."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["sft"] |= {"strategy": "auto", "precision": "fp32", "warmup_steps": 0}
    params[section] |= changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


@pytest.fixture(scope="module")
def planned(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Path:
    """Create a DVC checkout with `pack` and `base` up to date; its other stages have no dependencies."""
    folder = make_folder(tmp_path_factory.mktemp("planned"), tiny_base, ((0, 1), (2, 3), (4, 5)))
    write_params(folder)
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    stages = {
        name: {"cmd": stage["cmd"], "params": stage.get("params", [name])} for name, stage in graph.items()
    }
    stages["base"]["outs"] = ["data/base"]
    stages["pack"] |= {"deps": ["data/base"], "outs": ["data/pack"]}
    stages["sft"] |= {"deps": ["data/pack"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    for command in (["init", "-q", "--no-scm"], ["commit", "-f", "base", "pack"]):
        subprocess.run(["dvc", *command], cwd=folder, env=clean_environment, check=True)
    return folder


@pytest.fixture
def folder(planned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "checkout"))


def plan(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    more = {"PYTHONPATH": str(ROOT), "NIGHTSHIFT_HOME": str(folder / "state"), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**environment, **more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_plan_is_printed_without_torch(folder: Path, clean_environment: dict[str, str]) -> None:
    done = plan(folder, clean_environment)
    assert done.returncode == 0, done.stderr
    output = " ".join(done.stdout.split())
    # Two processes, so two steps of two rows; the six examples have 9, 31, 14, 40, 22 and 27 tokens.
    assert "steps 2 of 2 rows tokens 143 supervised tokens 73" in output
    assert "time unknown" in output
    assert "largest micro-batch: 54 tokens, 27 of them labelled" in output
    for strategy in ("single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"):
        assert f" {strategy} " in output
    assert "micro-batch 1 rows" in output
    assert " ingest " in output
    assert output.endswith("False")
    assert (folder / "state" / "plan.svg").read_text(encoding="utf-8").startswith("<svg")


def test_next_to_an_active_run_there_is_no_plan(
    folder: Path, clean_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(folder / "state"))
    with lease("run"):
        done = plan(folder, clean_environment)
    assert "a run is active in this checkout, and DVC works for one program at a time" in done.stderr
    assert "tokens" not in done.stdout


def test_missing_rows_are_an_error(folder: Path, clean_environment: dict[str, str]) -> None:
    (folder / "data" / "pack" / "train.parquet").unlink()
    done = plan(folder, clean_environment)
    assert "error: data/pack/train.parquet: not found; run `dvc repro pack` first" in done.stderr


def test_rows_from_other_parameters_give_no_plan(folder: Path, clean_environment: dict[str, str]) -> None:
    write_params(folder, "pack", max_length=64)
    done = plan(folder, clean_environment)
    output = " ".join(done.stdout.split())
    assert "dvc repro would run" in output
    assert " pack params.yaml " in output
    assert "steps" not in output
    assert "error: data/pack: built from other parameters, code or data; run `dvc repro pack`" in (
        done.stderr
    )


def test_manually_changed_rows_and_base_give_no_plan(folder: Path, clean_environment: dict[str, str]) -> None:
    rows = folder / "data" / "pack" / "train.parquet"
    write_rows(rows, read_rows(rows)[:2], ROWS)
    (folder / "data" / "base" / "base.json").write_text("{}")
    done = plan(folder, clean_environment)
    assert "error: data/pack and data/base: built from other parameters" in done.stderr
    assert "steps" not in done.stdout


def test_all_parameters_are_checked_before_anything_is_shown(
    folder: Path, clean_environment: dict[str, str]
) -> None:
    write_params(folder, "gate", alpha=5.0)
    done = plan(folder, clean_environment)
    assert done.stdout == "False\n"
    assert "error: params.yaml: 1 problem(s)" in done.stderr
    assert "gate.alpha: Input should be less than or equal to 0.5, got 5.0" in done.stderr


def test_a_folder_without_dvc_gives_no_plan(folder: Path, clean_environment: dict[str, str]) -> None:
    shutil.rmtree(folder / ".dvc")
    done = plan(folder, clean_environment)
    assert done.stdout == "False\n"
    assert "error: dvc status: ERROR: " in done.stderr


def with_driver(programs: Path, script: str, environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which nvidia-smi runs the given script."""
    fake = programs / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    return {**environment, "PATH": f"{programs}{os.pathsep}{environment['PATH']}"}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            "device: cpu, precision fp32 (nvidia-smi exited with code 18: Failed to initialize NVML: "
            "Driver/library version mismatch; GPUs of this machine are unusable until the driver is "
            "repaired)",
        ),
        (
            "echo 'No devices were found'; exit 6",
            "device: cpu, precision fp32 (nvidia-smi exited with code 6: No devices were found; ",
        ),
        (
            "echo 'NVIDIA GB10, [N/A], 12.1, 0, GPU-1'",
            "device: cuda, precision fp32 (NVIDIA GB10, as reported by nvidia-smi; memory unknown, so fit is "
            "not checked; assuming torch can use it)",
        ),
    ],
)
def test_the_plan_reports_the_output_of_the_driver(
    folder: Path, tmp_path: Path, clean_environment: dict[str, str], script: str, expected: str
) -> None:
    done = plan(folder, with_driver(tmp_path / "bin", script, clean_environment))
    assert done.returncode == 0, done.stderr
    assert expected in " ".join(done.stdout.split())
    assert "strategy: " in done.stdout


def test_activation_checkpointing_is_planned_if_needed_to_fit(
    folder: Path, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """Training takes 535.29 MiB with stored activations and 534.82 MiB with recomputed ones."""
    script = "echo 'NVIDIA L4, 535.05, 8.9, 0, GPU-1'"
    done = plan(folder, with_driver(tmp_path / "bin", script, clean_environment))
    assert done.returncode == 0, done.stderr
    output = " ".join(done.stdout.split())
    assert "activation checkpointing: on, since the run does not fit without it" in output
    assert "strategy: single (single: 0.5 GiB of 0.5 GiB" in output
    assert "does not fit into" not in output


def test_a_run_that_cannot_fit_is_rejected_after_the_table(
    folder: Path, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    script = "echo 'NVIDIA L4, 534.50, 8.9, 0, GPU-1'"
    done = plan(folder, with_driver(tmp_path / "bin", script, clean_environment))
    assert "error: params.yaml: sft.strategy=auto: single takes 0.5 GiB" in done.stderr
    assert " fsdp2 " in done.stdout
