"""Where runtime state lives: databases, checkpoints, memo caches, logs."""

import os
import sys
from pathlib import Path


def state_dir() -> Path:
    """Return the state folder, absolute: `NIGHTSHIFT_HOME`, or `.nightshift` in the checkout."""
    return Path(os.environ.get("NIGHTSHIFT_HOME") or ".nightshift").absolute()


def tools_environment() -> dict[str, str]:
    """Build what a program needs to find this Python's commands, and the operators compiled before."""
    return {
        # dvc.yaml says `python`, and DeepSpeed compiles with ninja: those beside the one that runs.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
        or str(state_dir() / "torch-extensions"),
    }
