"""Report of a run as Prefect artifacts of its flow run: a link to the page, and the summary."""

import shutil

from mlflow import MlflowClient
from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.stages import run_program
from nightshift.core.paths import PAGE, SHORT, TRAINING_RUN
from nightshift.core.state import state_dir
from nightshift.tracking.runs import experiment_id, tracking_uri
from nightshift.tracking.spool import training_run


def report(run_id: str | None) -> None:
    """Write the report and publish it in Prefect.

    Args:
        run_id: MLflow run that stores the page; None for the run that trained the candidate.
    """
    run_program("report", run_id)
    try:
        for file in (PAGE, SHORT):
            # The newest report is always there, whichever workspace wrote it.
            shutil.copyfile(file, state_dir() / file.name)
        create_link_artifact(page_url(run_id), "full report", key="report-page", description="finetune")
        create_markdown_artifact(SHORT.read_text(encoding="utf-8"), key="report", description="finetune")
    except Exception as err:  # noqa: BLE001 - reporting must not fail the night
        get_run_logger().warning("the report could not be linked: %s; it is at %s", err, PAGE)


def page_url(run_id: str | None) -> str:
    """Return the MLflow URL of the page; without a server, the URL of the local file."""
    uri = tracking_uri()
    if not uri.startswith("http"):
        return PAGE.absolute().as_uri()
    client = MlflowClient(uri)
    run = run_id or training_run(client, TRAINING_RUN)
    return f"{uri}/#/experiments/{experiment_id(client)}/runs/{run}/artifacts/{PAGE.name}"
