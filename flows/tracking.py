"""The MLflow run of one flow run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prefect.runtime.flow_run
from mlflow import MlflowClient

from tasks.files import file_digest, read_json
from tasks.tracking import experiment_id, git_commit, tracking_uri

TRAINED_BY = Path("data/sft/mlflow_run.json")


@contextmanager
def tracked_run() -> Iterator[str]:
    """Open an MLflow run for the flow run, and close it as finished or failed.

    On a night on which DVC had the training already, the tag `nightshift.training_run` leads to the
    run that did it.

    Yields:
        The id of the run.
    """
    client = MlflowClient(tracking_uri())
    name = prefect.runtime.flow_run.name or "finetune"
    tags = {
        "nightshift.flow_run": str(prefect.runtime.flow_run.id),
        "nightshift.params_digest": file_digest(Path("params.yaml")),
        "nightshift.git_commit": git_commit(),
    }
    run = client.create_run(experiment_id(client), run_name=name, tags=tags)
    run_id = str(run.info.run_id)
    status = "FAILED"
    try:
        yield run_id
        if trained_by := read_json(TRAINED_BY)["run_id"]:
            client.set_tag(run_id, "nightshift.training_run", trained_by)
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
