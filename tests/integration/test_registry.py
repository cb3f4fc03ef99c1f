"""Registering and promoting against a real MLflow: reload, expected champion, previous champion."""

import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tasks import promote, register, registry
from tasks.errors import GateError
from tasks.files import file_digest, read_json, tree_digest, write_json
from tasks.tracking import experiment_id, tracking_uri
from tests.checkouts import ROOT


@pytest.fixture
def trained(in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as it is after the gate, with a first candidate."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "params.yaml", in_tmp)
    (in_tmp / "dvc.lock").write_text("{}")
    shutil.copytree(tiny_base, in_tmp / "data/base/model")
    files = {p.name: file_digest(p) for p in (in_tmp / "data/base/model").iterdir()}
    write_json(in_tmp / "data/base/base.json", {"model": "tiny", "dtype": "float32", "files": files})
    write_json(in_tmp / "data/gate/gate.json", {"verdict": "promote", "reason": "better"})
    make_candidate(tiny_base, in_tmp, seed=1)
    return in_tmp


def make_candidate(base: Path, folder: Path, seed: int) -> None:
    """Write an adapter with weights that change the answer, as a training would."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    shutil.rmtree(folder / "data/sft/model", ignore_errors=True)
    model.save_pretrained(folder / "data/sft/model")
    client = MlflowClient(tracking_uri())
    run = client.create_run(experiment_id(client))
    write_json(folder / "data/sft/mlflow_run.json", {"run_id": run.info.run_id})


def champion() -> dict[str, object]:
    registry.write_champion(Path("data/champion"))
    record: dict[str, object] = read_json(Path("data/champion/champion.json"))
    return record


def test_two_nights_from_no_champion_to_a_second_one(trained: Path, tiny_base: Path) -> None:
    assert champion() == {"version": None, "digest": None, "looks": []}
    register.main()
    assert read_json(register.TARGET) == {"version": 1}
    promote.main()
    first = tree_digest(trained / "data/sft/model")
    assert champion() == {"version": 1, "digest": first, "looks": []}
    assert tree_digest(trained / "data/champion/model") == first

    make_candidate(tiny_base, trained, seed=2)
    write_json(register.GATE, {"verdict": "hold", "reason": "cannot tell"})
    register.main()
    second = tree_digest(trained / "data/sft/model")
    assert champion() == {"version": 1, "digest": first, "looks": [second]}
    with pytest.raises(GateError, match="the verdict is hold"):
        promote.main()

    promote.promote(2, expected_champion=1)
    client, name = registry.open_registry()
    assert int(client.get_model_version_by_alias(name, "champion").version) == 2
    assert int(client.get_model_version_by_alias(name, "previous-champion").version) == 1
    register.main()
    assert read_json(register.TARGET) == {"version": 2}


def test_a_champion_that_somebody_moved_stops_the_promotion(trained: Path) -> None:
    assert champion()["version"] is None
    register.main()
    promote.promote(1, expected_champion=None)
    client, name = registry.open_registry()
    client.delete_registered_model_alias(name, "champion")
    with pytest.raises(GateError, match="champion of nightshift is version None, but the gate compared"):
        promote.promote(1, expected_champion=9)
    assert registry.find_alias(client, name, "champion") is None


def test_a_model_that_does_not_reload_moves_no_alias(trained: Path) -> None:
    base = trained / "data/base/base.json"
    record = read_json(base)
    record["files"]["config.json"] = "0" * 64
    write_json(base, record)
    with pytest.raises(Exception, match="not the base that this adapter was trained on"):
        register.main()
    client, name = registry.open_registry()
    assert registry.find_alias(client, name, "candidate") is None


def test_an_error_of_the_gate_registers_nothing(trained: Path) -> None:
    write_json(register.GATE, {"verdict": "error", "reason": "3 scores are not numbers"})
    with pytest.raises(GateError, match="3 scores are not numbers; nothing is registered"):
        register.main()
