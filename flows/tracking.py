"""The MLflow run of one flow run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

import prefect.runtime.flow_run
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from nightshift.core.files import file_digest, read_json
from nightshift.core.paths import TRAINING_RUN
from nightshift.tracking.runs import experiment_id, git_commit, tracking_uri

FLOW_RUN = "nightshift.flow_run"


@contextmanager
def tracked_run() -> Iterator[str]:
    """Open an MLflow run for the flow run, and close it as finished or failed.

    If DVC had the training in its cache, the tag `nightshift.training_run` refers to its run.

    Yields:
        Id of the MLflow run.
    """
    client = MlflowClient(tracking_uri())
    close_abandoned(client)
    name = prefect.runtime.flow_run.name or "finetune"
    tags = {
        FLOW_RUN: str(prefect.runtime.flow_run.id),
        "nightshift.params_digest": file_digest(Path("params.yaml")),
        "nightshift.git_commit": git_commit(),
    }
    run = client.create_run(experiment_id(client), run_name=name, tags=tags)
    run_id = str(run.info.run_id)
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    finally:
        close(client, run_id, status)


def close(client: MlflowClient, run_id: str, status: str) -> None:
    """Close the run; an unreachable server does not fail the night."""
    try:
        trained_by = read_json(TRAINING_RUN)["run_id"] if status == "FINISHED" else None
        if trained_by:
            client.set_tag(run_id, "nightshift.training_run", trained_by)
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
