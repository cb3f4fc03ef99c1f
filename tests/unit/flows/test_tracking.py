"""The MLflow run of a flow run: an unreachable server at the end of a night does not fail the night."""

import logging
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows import tracking
from tests.helpers.checkouts import ROOT


def test_a_run_that_cannot_be_closed_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "get_run_logger", lambda: logging.getLogger("run"))
    tracking.close(MlflowClient("http://127.0.0.1:9"), "1234", "FAILED")
    assert "MLflow: run 1234 is not closed" in caplog.text
    assert "the next run closes it" in caplog.text


def test_the_list_of_runs_shows_how_each_ended(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "params.yaml", in_tmp)
    monkeypatch.setattr(tracking, "link", lambda: "[Flow run in Prefect](http://127.0.0.1:4200)")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "2026-01-31 nightly")
    client = MlflowClient(tracking.tracking_uri())
    run = client.create_run(tracking.experiment_id(client), run_name="2026-01-31 nightly")
    tracking.describe_run(run.info.run_id, "Held", "version 2 is not promoted")
    found = client.get_run(run.info.run_id)
    assert found.info.run_name == "2026-01-31 nightly: Held"
    assert found.data.tags["mlflow.note.content"].startswith("**Held**: version 2 is not promoted")
