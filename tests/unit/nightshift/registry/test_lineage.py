"""Code changes recorded in a version's lineage."""

import subprocess
from pathlib import Path

from nightshift.registry.lineage import changed_code


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
