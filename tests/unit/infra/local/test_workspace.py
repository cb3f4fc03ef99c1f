"""The pull step that makes a workspace: the flow must import everything from there."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.workspace import make_workspace
from nightshift.pipeline.workspaces import git


def test_the_step_and_the_engine_import_nothing_that_the_flow_imports_from_its_workspace() -> None:
    program = (
        "import sys, infra.local.outlast, infra.local.workspace;"
        "print({name.partition('.')[0] for name in sys.modules} & {'nightshift', 'tasks', 'flows'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_step_that_fails_says_why(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "00000001-x")
    with pytest.raises(RuntimeError, match=r"no workspace: error: .*run `git init` and `git commit`, or use"):
        make_workspace(str(in_tmp))
    git("init", "-q")
    with pytest.raises(RuntimeError, match="needs a git repository with a commit"):
        make_workspace(str(in_tmp))
    assert not list((in_tmp / ".nightshift").glob("workspaces/*"))
