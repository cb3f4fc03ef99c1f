"""The library in a notebook: imports leave the folder alone, and the examples of docs/library.md run."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import nightshift
from nightshift.core.errors import ConfigError
from nightshift.core.files import write_rows
from nightshift.data.schemas import ALL_SCORES
from nightshift.registry.versions import find_model
from tests.helpers.checkouts import ROOT
from tests.helpers.report import heldout, score

TEXT = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## ([^\n]*)\n[^#]*?^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", flags=re.MULTILINE)
# Reports what the imports do in the current folder, which -P keeps out of the path of the imports.
WATCH = """
import importlib, json, os, pkgutil, sys, threading
here, seen = os.getcwd(), []

def watch(event, arguments):
    is_file = event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename")
    if is_file and isinstance(arguments[0], str) and os.path.abspath(arguments[0]).startswith(here):
        seen.append(f"{event} {arguments[0]}")
    if event == "socket.connect":
        seen.append(f"{event} {arguments[1]}")

sys.addaudithook(watch)
import nightshift
names = [found.name for found in pkgutil.walk_packages(nightshift.__path__, "nightshift.")]
for name in [*names, "tasks.gate.decision", "tasks.check"]:
    importlib.import_module(name)
import psutil
print(json.dumps({
    "modules": len(names),
    "seen": seen,
    "threads": threading.active_count(),
    "children": len(psutil.Process().children()),
    "torch": "torch" in sys.modules,
    "loggers": len(importlib.import_module("logging").getLogger().handlers),
}))
"""


def test_importing_the_library_leaves_the_folder_alone_and_starts_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "notebook"
    folder.mkdir(mode=0o500)
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCH],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NIGHTSHIFT_HOME": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("modules") > 40
    assert found == {"seen": [], "threads": 1, "children": 0, "torch": False, "loggers": 0}
    assert list(folder.iterdir()) == []
    # MLflow's installation id, see docs/library.md.
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"telemetry.json"}


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert nightshift.__version__ == project["version"]
    with pytest.raises(AttributeError, match="module 'nightshift' has no attribute 'version'"):
        nightshift.version  # noqa: B018


def test_outside_a_checkout_a_call_is_an_error_and_writes_nothing(in_tmp: Path) -> None:
    with pytest.raises(ConfigError, match=r"params\.yaml: not found; run from the folder that contains it"):
        find_model("champion")
    assert list(in_tmp.iterdir()) == []


@pytest.fixture
def notebook(in_tmp: Path, registered: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a checkout with a champion and two tables of scores."""
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(registered / ".nightshift"))
    shutil.copy(registered / "params.yaml", in_tmp)
    (in_tmp / "data").mkdir()
    (in_tmp / "data/base").symlink_to(registered / "data/base")
    for path, right in (("last-week.parquet", 60), ("data/evaluate/scores.parquet", 84)):
        rows = [score("candidate", item, float(item < right)) for item in range(120)]
        write_rows(in_tmp / path, [*rows, heldout("candidate", "e1", 2.0, 4)], ALL_SCORES)
    return in_tmp


@pytest.mark.usefixtures("notebook")
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_every_example_prints_what_it_says(title: str, code: str) -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        exec(code, {})
    expected = PRINTED.findall(code)
    assert out.getvalue().splitlines() == expected
    assert expected


def test_every_function_of_the_overview_has_an_example() -> None:
    table = [line for line in TEXT.splitlines() if line.startswith("|")]
    named = re.findall(r"`([a-z_]+)`", "\n".join(table))
    assert len(EXAMPLES) == 4
    assert len(named) >= 8
    code = "\n".join(code for _, code in EXAMPLES)
    assert [name for name in named if f"{name}(" not in code] == []
