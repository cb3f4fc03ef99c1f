"""Location of the runtime state: databases, checkpoints, caches, logs."""

import os
import sys
from pathlib import Path

from nightshift.core.errors import ConfigError

# In the state folder: MLflow's database and artifacts, and the clones in which runs of deployments work.
DATABASE, ARTIFACTS, WORKSPACES = "mlflow.db", "mlflow-artifacts", "workspaces"
# In a workspace: the path of the checkout that it is a clone of.
ORIGIN = Path(".git", "nightshift-checkout")


def state_dir() -> Path:
    """Return the absolute state folder: `NIGHTSHIFT_HOME`, or `.nightshift` in the checkout.

    Raises:
        ConfigError: It is a file, or below a file.
    """
    home = Path(os.environ.get("NIGHTSHIFT_HOME") or ".nightshift").absolute()
    existing = next(path for path in (home, *home.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{home}: {existing} is a file; set NIGHTSHIFT_HOME to a folder")
    return home


def user_path(text: str) -> Path:
    """Return a path in params.yaml, with the home folder in place of `~`.

    In a workspace, a path that starts with `..` is beside its checkout, where the user sees it.

    Raises:
        RuntimeError: The user in `~user` does not exist.
    """
    path = Path(text).expanduser()
    if path.parts[:1] == ("..",) and ORIGIN.is_file():
        return Path(ORIGIN.read_text(encoding="utf-8"), path)
    return path


def tools_environment() -> dict[str, str]:
    """Return PATH with this Python's commands, and the folder of compiled torch extensions."""
    return {
        # dvc.yaml runs `python`, and DeepSpeed compiles with ninja: use those next to this interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
        or str(state_dir() / "torch-extensions"),
    }
