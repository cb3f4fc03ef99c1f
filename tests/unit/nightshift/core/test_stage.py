"""How a program ends: exit code, last line and result file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checkouts import ROOT

PROGRAM = """
import os
from nightshift.core.errors import DataError
from nightshift.core.stage import RESULT, run_main

def main(end: str) -> None:
    print(os.environ.get(RESULT))
    match end:
        case "wrong":
            raise DataError("rows.jsonl:3: no text; fill it")
        case "full":
            raise OSError(28, "No space left on device", "/data")
        case "bug":
            raise ValueError("oops")

run_main(main, lambda parser: parser.add_argument("end"))
"""
FULL = "[Errno 28] No space left on device: '/data'; free disk space or fix the permissions, then run again"


@pytest.mark.parametrize(
    ("end", "code", "result"),
    [
        ("right", 0, {"code": 0, "error": None}),
        ("wrong", 2, {"code": 2, "error": "rows.jsonl:3: no text; fill it"}),
        ("full", 2, {"code": 2, "error": FULL}),
        ("bug", 1, None),
        ("--help", 0, None),
    ],
)
def test_a_program_writes_its_result(end: str, code: int, result: object, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, end],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NIGHTSHIFT_RESULT": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert (json.loads(file.read_text()) if file.exists() else None) == result
    if end != "--help":
        # Unset, or child processes would write to the same file.
        assert done.stdout == "None\n"
    if code == 2:
        assert done.stderr.splitlines()[-1] == f"error: {result['error']}"  # type: ignore[index]


def test_the_lines_of_a_program_start_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text(
        """
import logging
from nightshift.core.stage import run_main

log = logging.getLogger(__name__)

def main() -> None:
    log.info("hello")

run_main(main)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "chatty"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.split(maxsplit=1)[1] == "chatty hello\n"
