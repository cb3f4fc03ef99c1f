"""The flow retries a training run while another attempt may get further, and retries nothing else."""

import ast
from pathlib import Path

import yaml

from tests.helpers.checkouts import run_flow

# Each attempt ends as the stage's file specifies.
STAGE = """
import os
from pathlib import Path
from nightshift.core.errors import ConfigError, TrainingError
from nightshift.core.stage import run_main

def main(name: str) -> None:
    ends = Path(f"{name}.ends").read_text().split()
    attempts = Path(f"{name}.attempts")
    number = len(attempts.read_text()) if attempts.exists() else 0
    attempts.write_text("x" * (number + 1))
    print("the last line of the output")
    match ends[number]:
        case "right":
            Path(f"{name}.done").touch()
        case "wrong":
            raise ConfigError(f"{name}: attempt {number + 1}")
        case "killed":
            os.kill(os.getpid(), 9)
        case kind:
            raise TrainingError(kind, f"{name}: attempt {number + 1}")

run_main(main, lambda parser: parser.add_argument("name"))
"""
FLOW = """
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows.stages import run_stage

@flow
def train() -> None:
    run_stage("recovers", "")
    states = [run_stage(stage, "", return_state=True) for stage in ("recovers", "misconfigured", "killed")]
    print([(state.name, state.message) for state in states])

with prefect_test_harness():
    train()
"""


def test_training_errors_are_retried_but_configuration_errors_are_not(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    ends = {
        "recovers": "out_of_memory loss hang preempted right",
        "misconfigured": "wrong right",
        "killed": "killed right",
    }
    for name, value in ends.items():
        (tmp_path / f"{name}.ends").write_text(value)
    (tmp_path / "stage.py").write_text(STAGE)
    stages = {name: {"cmd": f"python stage.py {name}", "outs": [f"{name}.done"]} for name in ends}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    output = run_flow(tmp_path, FLOW, clean_environment)
    attempts = {name: len((tmp_path / f"{name}.attempts").read_text()) for name in ends}
    assert attempts == {"recovers": 5, "misconfigured": 1, "killed": 1}
    (states,) = [line for line in output if line.startswith("[(")]
    recovered, misconfigured, killed = ast.literal_eval(states)
    # In the second run, DVC has the result cached.
    assert recovered[0] == "Cached"
    assert misconfigured[0] == killed[0] == "Failed"
    assert "misconfigured failed with exit code 2: misconfigured: attempt 1" in misconfigured[1]
    assert "killed failed with exit code 255: ERROR: failed to reproduce 'killed'" in killed[1]
