"""MLflow's address, the run that a stage logs to, and the datasets of a run.

MLflow takes two seconds to import, so it is imported where it is used.
"""

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nightshift.core.config import read_params
from nightshift.core.state import DATABASE, state_dir

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

# Tags of a new experiment: MLflow's pages show training runs instead of traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# Tag of a run that was planned before MLflow could create it.
KEY = "nightshift.tracking_key"
# Environment variable with the commit that a run works on.
COMMIT = "NIGHTSHIFT_COMMIT"
log = logging.getLogger(__name__)


def tracking_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, or the local database, which the local stack also serves."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    home = state_dir()
    home.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{home / DATABASE}"


def experiment_name() -> str:
    """Return `registry.experiment` of params.yaml."""
    return str(read_params()["registry"]["experiment"])


def experiment_id(client: "MlflowClient") -> str:
    """Return the project's experiment; create it at first use, even if other processes do the same."""
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    # With a database, the default would be ./mlruns of the caller.
    location = None if client.tracking_uri.startswith("http") else "mlflow-artifacts:/"
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def run_id(client: "MlflowClient") -> str:
    """Return the run in `MLFLOW_RUN_ID`, or create a separate run."""
    if handed := os.environ.get("MLFLOW_RUN_ID"):
        return handed
    run = client.create_run(experiment_id(client), run_name=f"by-hand-{Path.cwd().name}")
    return str(run.info.run_id)


def open_run(client: "MlflowClient", key: str, name: str, start_time: int) -> str:
    """Return the run with a key, or create it.

    Args:
        client: MLflow client.
        key: Tag of the run, by which a retry finds it.
        name: Name of a new run.
        start_time: Start of a new run, milliseconds since 1970.
    """
    if found := find_run(client, key):
        return found
    run = client.create_run(experiment_id(client), run_name=name, start_time=start_time, tags={KEY: key})
    return str(run.info.run_id)


def find_run(client: "MlflowClient", key: str) -> str | None:
    """Return the run with a key, or None."""
    found = client.search_runs([experiment_id(client)], f"tags.`{KEY}` = '{key}'")
    return str(found[0].info.run_id) if found else None


def dataset_input(name: str, digest: str, path: str, context: str) -> "DatasetInput":
    """Build MLflow's record of a dataset that a run used.

    Args:
        name: Name of the dataset.
        digest: DVC digest of the dataset.
        path: Path of the dataset in the checkout, as DVC tracks it.
        context: training or evaluation.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow reads a local source only in this JSON form.
    source = json.dumps({"uri": path})
    dataset = Dataset(name=name, digest=digest, source_type="local", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context), InputTag("dvc.path", path)])


def flow_run() -> str | None:
    """Return the id of the Prefect flow run that this process belongs to; None outside Prefect."""
    return os.environ.get("PREFECT__FLOW_RUN_ID")


def git_commit() -> str:
    """Return the commit of the run, or of the checkout, or `none` outside git."""
    if pinned := os.environ.get(COMMIT):
        return pinned
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


@contextmanager
def pinned_commit() -> Iterator[str]:
    """Let all programs in the block record the commit of now; HEAD of a checkout may move meanwhile.

    Yields:
        The commit.
    """
    os.environ[COMMIT] = commit = git_commit()
    try:
        yield commit
    finally:
        del os.environ[COMMIT]


def has_local_changes() -> bool:
    """Return whether a tracked file of the checkout differs from its commit."""
    command = ["git", "status", "--porcelain", "--untracked-files=no"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return bool(done.stdout.strip())
