"""Where runtime state lives: databases, checkpoints, memo caches, logs."""

import os
from pathlib import Path


def state_dir() -> Path:
    """Return the state folder, absolute: `NIGHTSHIFT_HOME`, or `.nightshift` in the checkout."""
    return Path(os.environ.get("NIGHTSHIFT_HOME") or ".nightshift").absolute()
