"""All of params.yaml is checked before anything runs."""

from typing import Any

import pytest

from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError
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
    params["augment"]["sources"] = ["element"]
    params["gate"]["floors"] = {"countrys": 0.5}
    params["evaluate"]["retrieval"]["benchmarks"] = ["elements", "element"]
    with pytest.raises(ConfigError) as caught:
        check(params)
    assert str(caught.value).splitlines()[1:] == [
        "  sft: warmup_steps=3 must be below max_steps=3; lower it",
        "  augment.sources: no source is named element; did you mean elements?",
        "  evaluate.retrieval.benchmarks: no benchmark is named element; did you mean elements?",
        "  gate.floors: no benchmark is named countrys; did you mean countries?",
    ]


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
