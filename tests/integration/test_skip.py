"""A night whose training would gain too little ends before it, in the real flow."""

import ast
import shutil
from pathlib import Path

import yaml

from nightshift.pipeline.graph import stage_order
from tests.helpers.checkouts import ROOT, run_flow

# Seeds the registry and five nights, then runs the flow on new data: without a limit, and with one.
FLOW = """
from pathlib import Path
from mlflow import MlflowClient
from prefect.testing.utilities import prefect_test_harness
from flows.finetune import finetune
from nightshift.core.files import write_json, write_rows
from nightshift.data.schemas import AUGMENTED
from nightshift.pipeline.params_yaml import edit
from nightshift.registry import versions
from tests.helpers.nights import age_by, log_nights

client, name = versions.open_registry()
client.create_registered_model(name)
client.create_model_version(name, str(Path.cwd()), tags={versions.DIGEST: "a" * 64})
client.set_registered_model_alias(name, "champion", "1")
write_json(Path("data/champion/champion.json"), {"arrival": 0})
write_rows(Path("data/decontaminate/train.parquet"), [], AUGMENTED)
log_nights(client, age_by(20, [1, 2, 4, 8, 16]))
with prefect_test_harness():
    states = []
    for night, least in enumerate((0, 0.9)):
        Path("shard").write_text(str(night))
        params = Path("params.yaml")
        params.write_text(edit(params.read_text(), {"nightly.min_expected_gain": least}))
        states.append(finetune(return_state=True))
    named = "tags.mlflow.runName LIKE '%finetune%'"
    runs = client.search_runs(["1"], named, order_by=["attributes.start_time"])
    print([(state.type.value, state.name, state.message) for state in states])
    print([(run.info.status, run.info.run_name.partition(" ")[2]) for run in runs])
"""


def test_a_night_that_would_gain_too_little_is_skipped(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    stages, previous = {}, "shard"
    for stage in stage_order(ROOT / "dvc.yaml"):
        out = "data/pack/train.parquet" if stage == "pack" else f"data/{stage}/out"
        command = f"echo {stage} >> stages && mkdir -p data/{stage} && cp {previous} {out}"
        stages[stage] = {"cmd": command, "deps": [previous], "outs": [out]}
        previous = out
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    output = run_flow(tmp_path, FLOW, clean_environment)
    # A line of the server's log may follow.
    states, runs = (ast.literal_eval(line) for line in output if line.startswith("[("))
    # Without a limit, the night trains. It fails at the ledger, which misses the summaries of the stages.
    assert states[0][0] == "FAILED"
    assert states[1][:2] == ("COMPLETED", "Skipped")
    assert "less than nightly.min_expected_gain (90.0%): version 1, the champion" in states[1][2]
    ran = (tmp_path / "stages").read_text().split()
    assert (ran.count("pack"), ran.count("sft"), ran.count("gate")) == (2, 1, 1)
    assert [status for status, _ in runs] == ["FAILED", "FINISHED"]
    assert runs[1][1] == "finetune: Skipped"
