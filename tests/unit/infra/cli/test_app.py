"""Output and exit codes of the commands; their effects are tested with the code that implements them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cli.app import app
from nightshift.core.files import write_json
from nightshift.core.paths import GATE

CHECK = {"name": "gain", "verdict": "hold", "message": "inconclusive: +1.0% accuracy [-2.0%, 4.0%]"}
# As an earlier release wrote it.
OLD_CHECK = {"name": "slices", "verdict": "promote", "said": "none of 2 is worse"}


@pytest.mark.parametrize(("verdict", "code"), [("promote", 0), ("hold", 3), ("reject", 4), ("error", 5)])
@pytest.mark.usefixtures("in_tmp")
def test_gate_shows_all_checks_and_returns_the_code_of_the_verdict(verdict: str, code: int) -> None:
    write_json(GATE, {"verdict": verdict, "reason": "", "checks": [CHECK, OLD_CHECK]})
    done = CliRunner().invoke(app, ["gate"], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert lines[0] == ["Gate:", verdict]
    assert lines[2] == ["gain", "hold", "inconclusive:", "+1.0%", "accuracy", "[-2.0%,", "4.0%]"]
    assert lines[3] == ["slices", "promote", "none", "of", "2", "is", "worse"]


def test_gate_without_a_verdict_explains_how_to_get_one(
    in_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert CliRunner().invoke(app, ["gate"]).exit_code == 2
    assert not (in_tmp / GATE).exists()
    assert "data/gate/gate.json: not found; `nightshift run` or `dvc repro gate` writes it" in (
        capfd.readouterr().err + CliRunner().invoke(app, ["gate"]).output
    )


def test_export_reports_the_logit_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"merged": {"largest": 1.04e-05, "bound": 0.001}, "gguf": None}
    record = {"version": 7, "model": "nightshift", "differences": found}
    monkeypatch.setattr("nightshift.registry.versions.find_model", lambda model: model)
    monkeypatch.setattr("infra.cli.export.export", lambda *_, **__: record)
    done = CliRunner().invoke(app, ["export", "--to", "out"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "version 7 of nightshift is in out",
        "merged: logits differ by up to 1e-05 of their standard deviation (limit: 0.001)",
        "gguf: not checked, see above",
    ]
