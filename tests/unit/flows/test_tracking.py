"""The MLflow run of a flow run: an unreachable server at the end of a night does not fail the night."""

import logging

import pytest
from mlflow import MlflowClient

from flows import tracking


def test_a_run_that_cannot_be_closed_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "get_run_logger", lambda: logging.getLogger("run"))
    tracking.close(MlflowClient("http://127.0.0.1:9"), "1234", "FAILED")
    assert "MLflow: run 1234 is not closed" in caplog.text
    assert "the next run closes it" in caplog.text
