"""Output and exit codes of the commands; their effects are tested with the code that implements them."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.cli.app import app
from infra.local import stack
from nightshift.core.files import write_json
from nightshift.core.paths import GATE
from tests.helpers.checkouts import ROOT

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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("sft.seed=7", "error: --overrides: not JSON: "),
        ("[1]", "error: --overrides: [1] is not a JSON object; "),
        ('{"sft.sed": 7}', "sft.sed: unknown key; did you mean seed?"),
        ('{"sft.seed": NaN}', "sft.seed: Input should be a valid integer"),
        ('{"sft.seed.x": 7}', "override 'sft.seed.x': seed has no keys, its value is 0"),
    ],
)
def test_invalid_overrides_are_reported_before_anything_starts(
    overrides: str, message: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> Any:
        raise AssertionError("the servers were started")

    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp)
    monkeypatch.setattr(stack, "up", start)
    done = CliRunner().invoke(app, ["run", "--overrides", overrides])
    assert done.exit_code == 2, done.output
    assert message in done.output


@pytest.mark.parametrize("verb", ["up", "down", "status"])
@pytest.mark.parametrize(("code", "name"), [(errno.ENOSPC, "stack.json"), (errno.EACCES, "stack.lock")])
def test_a_full_or_unwritable_disk_is_reported_in_one_line(
    verb: str, code: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(code, "no luck", name)

    def fail() -> Any:
        raise error

    monkeypatch.setattr(stack, verb, fail)
    done = CliRunner().invoke(app, [verb])
    line = (
        f"error: [Errno {code}] no luck: '{name}'; free disk space or fix the permissions, then run again\n"
    )
    assert (done.exit_code, done.output) == (2, line)


def test_an_unknown_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ECONNRESET, "a bug")

    def fail() -> Any:
        raise error

    monkeypatch.setattr(stack, "down", fail)
    assert CliRunner().invoke(app, ["down"]).exception is error


@pytest.mark.parametrize("home", ["a-file", "a-file/below"])
@pytest.mark.parametrize("verb", ["up", "down", "status"])
def test_a_state_folder_that_is_a_file_is_reported(
    home: str, verb: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "a-file").touch()
    (in_tmp / "prefect.yaml").touch()
    monkeypatch.setenv("NIGHTSHIFT_HOME", home)
    done = CliRunner().invoke(app, [verb])
    line = f"error: {in_tmp / home}: {in_tmp / 'a-file'} is a file; set NIGHTSHIFT_HOME to a folder\n"
    assert (done.exit_code, done.output) == (2, line)


def test_a_registry_that_does_not_answer_is_one_line_without_credentials(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = CliRunner().invoke(app, ["export", "7", "--to", "out"])
    output = done.output + capfd.readouterr().err
    assert done.exit_code == 2, output
    assert "error: registry: MlflowException: " in output
    assert "check `nightshift status` and MLFLOW_TRACKING_URI" in output
    assert "secret" not in output
    assert "no version" not in output
