"""The MLflow run of one flow run."""

import getpass
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import prefect.runtime.flow_run
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_DIRTY,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for

from nightshift.core.config import read_params
from nightshift.core.files import file_digest, read_json
from nightshift.core.paths import TRAINING_RUN
from nightshift.tracking.runs import experiment_id, git_commit, has_local_changes, tracking_uri

FLOW_RUN = "nightshift.flow_run"


@contextmanager
def tracked_run(*, has_changed: bool) -> Iterator[str | None]:
    """Open an MLflow run for the flow run, and close it as finished or failed.

    Args:
        has_changed: Whether any stage has new input; otherwise there is nothing to track, and no run.

    Yields:
        Id of the MLflow run, or None.
    """
    client = MlflowClient(tracking_uri())
    close_abandoned(client)
    if not has_changed:
        yield None
        return
    name = prefect.runtime.flow_run.name or "finetune"
    run = client.create_run(experiment_id(client), run_name=name, tags=run_tags())
    run_id = str(run.info.run_id)
    log_params(client, run_id)
    watch_machine(run_id)
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    finally:
        close(client, run_id, status)


def run_tags() -> dict[str, str]:
    """Return the tags of a new run: those that MLflow's pages show, and those that identify its inputs."""
    return {
        FLOW_RUN: str(prefect.runtime.flow_run.id),
        "nightshift.params_digest": file_digest(Path("params.yaml")),
        "nightshift.git_commit": git_commit(),
        MLFLOW_USER: getpass.getuser(),
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_SOURCE_NAME: "flows/finetune.py",
        MLFLOW_GIT_COMMIT: git_commit(),
        MLFLOW_GIT_DIRTY: str(has_local_changes()).lower(),
        MLFLOW_RUN_NOTE: link(),
    }


def link() -> str:
    """Return a Markdown link to the flow run in Prefect."""
    # `prefect.runtime.flow_run.ui_url` is the address of an earlier UI.
    return f"[Flow run in Prefect]({url_for('flow-run', UUID(prefect.runtime.flow_run.id))})"


def describe_run(run_id: str | None, outcome: str, message: str) -> None:
    """Show how the run ended in MLflow, by its name in the list and on its page; an error is only logged."""
    if run_id is None:
        return
    client, name = MlflowClient(tracking_uri()), prefect.runtime.flow_run.name or "finetune"
    try:
        client.update_run(run_id, name=f"{name}: {outcome}")
        client.set_tag(run_id, MLFLOW_RUN_NOTE, f"**{outcome}**: {message}\n\n{link()}")
    except MlflowException as err:
        get_run_logger().warning("MLflow: run %s has no description: %s", run_id, err)


def log_params(client: MlflowClient, run_id: str) -> None:
    """Log the parameters in use; an error is only logged."""
    params = [Param(key, value[:MAX_PARAM_VAL_LENGTH]) for key, value in flatten(read_params())]
    try:
        client.log_batch(run_id, params=params)
    except MlflowException as err:
        get_run_logger().warning("MLflow: the parameters are not logged to run %s: %s", run_id, err)


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the parameters in use as (`section.key`, value); training logs its own section, resolved.

    Example:
        >>> list(flatten({"gate": {"alpha": 0.05, "floors": {}}, "sft": {"seed": 1}}))
        [('gate.alpha', '0.05'), ('gate.floors', '{}')]
    """
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            if name != "sft":
                yield from flatten(value, f"{name}.")
        else:
            yield name, str(value)


def watch_machine(run_id: str) -> None:
    """Log CPU, memory, disk, network and GPU use every 30 seconds until the run is closed."""
    try:
        SystemMetricsMonitor(run_id, sampling_interval=30, tracking_uri=tracking_uri()).start()
    except Exception as err:  # noqa: BLE001 - reporting must not fail the night
        get_run_logger().warning("MLflow: no system metrics are logged to run %s: %s", run_id, err)


def link_training(run_id: str | None) -> None:
    """Tag the run with the one that trained the candidate: another one, if DVC had it in its cache."""
    if run_id is None or not (trained_by := read_json(TRAINING_RUN)["run_id"]):
        return
    try:
        MlflowClient(tracking_uri()).set_tag(run_id, "nightshift.training_run", trained_by)
    except MlflowException as err:
        get_run_logger().warning("MLflow: run %s is not linked to its training: %s", run_id, err)


def close(client: MlflowClient, run_id: str, status: str) -> None:
    """Close the run; an unreachable server does not fail the night."""
    try:
        client.set_terminated(run_id, status)
    except MlflowException as err:
        get_run_logger().warning("MLflow: run %s is not closed: %s; the next run closes it", run_id, err)


def close_abandoned(client: MlflowClient) -> None:
    """Close the runs of killed flow runs, which could not close them themselves."""
    with get_client(sync_client=True) as prefect:
        for run in client.search_runs([experiment_id(client)], "attributes.status = 'RUNNING'"):
            # Runs of another Prefect server are unknown here and may still be running.
            with suppress(ObjectNotFound, KeyError):
                state = prefect.read_flow_run(UUID(run.data.tags[FLOW_RUN])).state
                if state and state.is_final():
                    client.set_terminated(run.info.run_id, "KILLED")
