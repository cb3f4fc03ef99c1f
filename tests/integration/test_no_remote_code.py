"""No library may download code: the package that fetches code from a hub cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checkouts import ROOT

# bitsandbytes calls it on CPUs with bf16, transformers when an attention package is missing.
PLANTED = "def get_kernel(*_, **__):\n    raise SystemExit('fetched code from a hub')\n"


@pytest.mark.parametrize("module", ["nightshift", "nightshift.registry.served_model"])
def test_the_kernels_package_cannot_be_imported(module: str, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(PLANTED)
    code = (
        f"import {module}\n"
        "import bitsandbytes, peft\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "import kernels\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1] == "ModuleNotFoundError: import of kernels halted; None in sys.modules"
    assert [line for line in lines if "gemm_4bit" in line] == []
