"""The flow tries a training again for as long as another attempt may get further, and nothing else."""

import subprocess
import sys
from pathlib import Path

import yaml

from tests.checkouts import ROOT

# Ends with the codes of its file, one after the other.
STAGE = """
import sys
from pathlib import Path

name = sys.argv[1]
codes = Path(f"{name}.codes").read_text().split()
attempts = Path(f"{name}.attempts")
number = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text("x" * (number + 1))
if codes[number] != "0":
    print(f"error: {name}: attempt {number + 1}")
sys.exit(int(codes[number]))
"""
FLOW = """
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows.stages import run_stage

@flow
def train() -> None:
    for stage in ("recovers", "misconfigured"):
        run_stage(stage, "")

with prefect_test_harness():
    train()
"""


def test_each_kind_of_a_training_error_is_tried_again_and_a_wrong_configuration_is_not(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    # Out of memory, a bad loss, a hang, preempted; then it gets through.
    codes = {"recovers": "10 11 12 75 0", "misconfigured": "2 0"}
    for name, value in codes.items():
        (tmp_path / f"{name}.codes").write_text(value)
    (tmp_path / "stage.py").write_text(STAGE)
    stages = {name: {"cmd": f"python stage.py {name}"} for name in codes}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, env=clean_environment, check=True)
    done = subprocess.run(
        [sys.executable, "-c", FLOW],
        cwd=tmp_path,
        env={**clean_environment, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    attempts = {name: len((tmp_path / f"{name}.attempts").read_text()) for name in codes}
    assert attempts == {"recovers": 5, "misconfigured": 1}
    assert "misconfigured failed with exit code 255: error: misconfigured: attempt 1" in done.stdout
