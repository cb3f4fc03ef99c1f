"""The files that the base stage writes."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from nightshift.core.files import tree_digest
from tests.helpers.checkouts import ROOT, small_params


def test_the_files_are_identical_online_and_offline(tiny_base: Path, tmp_path: Path) -> None:
    digests = set()
    for offline in "01":
        folder = tmp_path / offline
        folder.mkdir()
        (folder / "params.yaml").write_text(yaml.safe_dump(small_params(tiny_base)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": offline}
        subprocess.run([sys.executable, "-m", "tasks.base"], cwd=folder, env=environment, check=True)
        digests.add(tree_digest(folder / "data"))
    assert len(digests) == 1
