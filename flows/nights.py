"""Nights that were missed: when several are due at once, only the newest one runs.

Prefect starts all late runs, in any order. An older one would train on the same data as the newest one.
"""

from datetime import UTC, datetime

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext


def describe_missed_night() -> str | None:
    """Return why the current run ends at once: a newer night of its schedule is due. None otherwise.

    An error is only logged: better train twice than not at all.
    """
    context = FlowRunContext.get()
    try:
        return find_newer_night(context.flow_run if context else None, datetime.now(UTC))
    except Exception as err:  # noqa: BLE001 - a server that does not answer must not end the night
        get_run_logger().warning("whether a newer night is due is unknown: %s", err)
        return None


def find_newer_night(run: FlowRun | None, now: datetime) -> str | None:
    """Return why a run ends at once at a moment; see `describe_missed_night`."""
    if run is None or not run.auto_scheduled or run.deployment_id is None or run.expected_start_time is None:
        return None
    planned = run.expected_start_time
    due = FlowRunFilterExpectedStartTime.model_validate({"after_": planned, "before_": now})
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(expected_start_time=due),
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
    nights = [one.expected_start_time for one in runs if one.auto_scheduled and one.expected_start_time]
    if not nights or nights[0] <= planned:
        return None
    own, newest = (f"{moment.astimezone():%Y-%m-%d %H:%M}" for moment in (planned, nights[0]))
    return (
        f"the night of {own} could not start before that of {newest} was due, which trains on all that has "
        "arrived"
    )
