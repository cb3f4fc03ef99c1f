"""Code changes recorded in a version's lineage."""

import subprocess
from pathlib import Path

import pytest

from nightshift.core.files import write_json, write_rows
from nightshift.core.paths import PACKED, PREFERENCES, TUNING_RECORD
from nightshift.data.schemas import PLACED_PREFERENCES
from nightshift.registry.lineage import changed_code, trained_rows
from tasks.pack import ROWS
from tests.helpers.prefer import comparison


def test_changed_code_is_listed_but_params_yaml_is_not(in_tmp: Path) -> None:
    (in_tmp / "tasks").mkdir()
    for name in ("tasks/a.py", "dvc.yaml", "params.yaml"):
        (in_tmp / name).write_text("1\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert changed_code() == []
    for name in ("tasks/a.py", "dvc.yaml", "params.yaml"):
        (in_tmp / name).write_text("2\n")
    assert changed_code() == ["dvc.yaml", "tasks/a.py"]


@pytest.mark.parametrize(("method", "more"), [(None, []), ("dpo", [("p0", "made/000001.jsonl:1")])])
def test_compared_rows_were_trained_if_preference_tuning_is_on(
    in_tmp: Path, method: str | None, more: list[tuple[str, str]]
) -> None:
    packed = {name: [] for name in ROWS.names} | {"example_ids": ["e"], "origins": ["a/000001.jsonl:7"]}
    write_rows(PACKED, [packed], ROWS)
    write_rows(PREFERENCES, [comparison(0), comparison(1, "validation")], PLACED_PREFERENCES)
    write_json(TUNING_RECORD, {"method": method})
    assert list(trained_rows()) == [("e", "a/000001.jsonl:7"), *more]
