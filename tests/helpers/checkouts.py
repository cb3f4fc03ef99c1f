"""Checkouts of the project for tests that run stages: real code, small model, few rows."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from infra.local import prefect_api

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FOLDERS = ("nightshift", "tasks", "flows", "infra")
FILES = ("dvc.yaml", "prefect.yaml", "pyproject.toml", ".dvcignore", ".gitignore")


class Checkout:
    """A folder and the commands that a user runs in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def type(self, *command: str, code: int = 0, answer: str = "") -> str:
        """Run a command to completion, assert its exit code and return its output.

        Args:
            command: Program and arguments.
            code: Expected exit code.
            answer: What the user types into the command.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            input=answer,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout


class ServedCheckout(Checkout):
    """A checkout with its own stack."""

    def make_run(self) -> str:
        """Run `make run` with the environment that is already installed."""
        return self.type("make", f"VENV={BIN.parent}", "-o", f"{BIN.parent}/ready", "run")

    def api(self, path: str, body: dict[str, Any]) -> Any:
        """Call the API of this checkout's Prefect server."""
        found = tomllib.loads((self.folder / "prefect.toml").read_text())["api"]
        return prefect_api.call(found["url"], found["auth_string"], "POST", path, body)

    def last_run(self) -> dict[str, Any]:
        """Return the flow run that was started last."""
        begun = {"start_time": {"is_null_": False}}
        body = {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": begun}
        body["flows"] = {"name": {"any_": ["finetune"]}}
        run: dict[str, Any] = self.api("/flow_runs/filter", body)[0]
        return run

    def mlflow_runs(self) -> list[str]:
        """Return the ids of all MLflow runs."""
        # Takes seconds, and most tests need none.
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / '.nightshift' / 'mlflow.db'}")
        return sorted(run.info.run_id for run in client.search_runs(["1"]))

    def task_states(self) -> dict[str, str]:
        """Return task name -> state for the last flow run."""
        body = {"flow_runs": {"id": {"any_": [self.last_run()["id"]]}}}
        return {task["name"]: task["state_name"] for task in self.api("/task_runs/filter", body)}


def small_params(base: Path) -> dict[str, Any]:
    """Return the shipped parameters, reduced to a few steps of the small model on few rows."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["base"] |= {"model": str(base), "dtype": "float32"}
    params["snapshot"]["sources"] = {"elements": "package:mendeleev"}
    params["sft"] |= {"max_steps": 6, "save_steps": 2, "warmup_steps": 1}
    params["evaluate"] |= {"limit": 60, "batch_size": 60, "retrieval": None}
    params["gate"] |= {"min_items": 20}
    params["split"] |= {"by_phrasing": [], "test_share": 0.3}
    return params


def make_checkout(folder: Path, base: Path) -> Path:
    """Create a git and DVC checkout with the project's code and small parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(small_params(base)), encoding="utf-8")
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "checkout"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def run_flow(folder: Path, script: str, environment: dict[str, str]) -> list[str]:
    """Run a script with a Prefect flow in a new git and DVC checkout, and return the lines that it printed.

    Args:
        folder: Folder with a dvc.yaml.
        script: Python code that starts its own Prefect server.
        environment: Environment of a new user's shell.
    """
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, env=environment, check=True)
    flow = {**environment, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / "prefect")}
    return Checkout(folder, flow).type(sys.executable, "-c", script).splitlines()
