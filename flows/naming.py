"""Names and tags of flow runs, so that Prefect's list of runs reads like a diary."""

from collections.abc import Iterable
from datetime import datetime

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run


def name_run() -> str:
    """Return the name of the current run: date, flow or deployment, such as `2026-01-31 nightly`."""
    if night := (flow_run.parameters.get("overrides") or {}).get("snapshot.until"):
        return f"{night[:10]} backfill"
    name = flow_run.flow_name if deployment.name in (None, "prod", "here") else deployment.name
    return f"{datetime.now().astimezone():%Y-%m-%d} {name}"


def add_tags(tags: Iterable[str]) -> None:
    """Add tags to the current run; an error is only logged."""
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, tags={*flow_run.tags, *tags})
    except Exception as err:  # noqa: BLE001 - reporting must not fail the night
        get_run_logger().warning("the run is not tagged: %s", err)
