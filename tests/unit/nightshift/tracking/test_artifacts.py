"""Artifact locations of MLflow, with and without a server."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from nightshift.tracking import runs
from nightshift.tracking.artifacts import open_artifacts


def test_without_a_server_mlflow_finds_the_files_in_the_state_folder(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow itself calls the plugin, for the location that a server would give a new experiment."""
    monkeypatch.setattr(runs, "experiment_name", lambda: "support chat")
    client = MlflowClient(f"sqlite:///{in_tmp / 'mlflow.db'}")
    run = client.create_run(runs.experiment_id(client)).info
    assert run.artifact_uri == f"mlflow-artifacts:/{run.run_id}/artifacts"
    client.log_text(run.run_id, "hello", "notes/a.txt")
    (stored,) = (in_tmp / ".nightshift" / "mlflow-artifacts").rglob("a.txt")
    assert stored.read_text() == "hello"
    assert [one.path for one in client.list_artifacts(run.run_id)] == ["notes"]
    files = get_artifact_repository(run.artifact_uri, tracking_uri=client.tracking_uri)
    files.delete_artifacts("notes/a.txt")
    assert not stored.exists()


def test_a_new_experiment_is_shown_as_training_under_the_name_in_params(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "params.yaml").write_text("registry: {experiment: support}\n", encoding="utf-8")
    client = MlflowClient(f"sqlite:///{in_tmp / 'mlflow.db'}")
    assert runs.experiment_id(client) == runs.experiment_id(client)
    found = client.get_experiment_by_name("support")
    assert found
    assert found.tags["mlflow.experimentKind"] == "custom_model_development"


def test_with_a_server_its_address_is_used() -> None:
    files = open_artifacts("mlflow-artifacts:/1/2/artifacts", "http://127.0.0.1:5000")
    assert isinstance(files, MlflowArtifactsRepository)
    assert files.artifact_uri == "http://127.0.0.1:5000/api/2.0/mlflow-artifacts/artifacts/1/2/artifacts"


def test_a_location_outside_the_folder_is_refused() -> None:
    with pytest.raises(MlflowException, match="not a location inside"):
        open_artifacts("mlflow-artifacts:/1/../../secret", "sqlite:///x.db")
