"""A measurement is recorded wherever it was made."""

import json
from pathlib import Path

import pytest

from benchmarks import record, stages


def test_results_are_written_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.write_records("gpu", [record.record("speed", 9.0, "tokens/s")], ("torch",))
    (written,) = json.loads((tmp_path / "gpu.json").read_text())
    assert (written["value"], written["commit"]) == (9.0, "unknown")
    monkeypatch.setenv("PATH", "")
    assert record.commit() == "unknown"


def test_a_stage_gets_library_paths_but_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/nvidia/lib64")
    monkeypatch.setenv("PYTHONPATH", "/opt/wheels")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    environment = stages.environment(tmp_path)
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert environment["PYTHONPATH"] == f"{stages.ROOT}:/opt/wheels"
    assert "MLFLOW_TRACKING_URI" not in environment
