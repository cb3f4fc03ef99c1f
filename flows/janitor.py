"""Mark flow runs as crashed if their process is dead, and no others; remove what no later run needs.

It runs every hour, and an automation starts it when a run misses three heartbeats. A busy machine or an
unreachable Prefect server is enough for that; only the lease of the run proves that its process has ended. A
run without a lease that never goes on, such as one that began when the disk was full, is ended later.
"""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from nightshift.core.errors import PipelineError
from nightshift.pipeline.leases import lease_file, lease_holder, leased_runs
from nightshift.pipeline.prune import prune

# The flows that hold a lease while they work, and how long they may take until they do.
LEASED = ["finetune", "promote", "rollback"]
STUCK = timedelta(minutes=15)


@flow(name="janitor", persist_result=False)
def janitor() -> None:
    """Release the queue slots of dead and stuck runs, and remove what is old."""
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        for run in leased_runs():
            if lease_holder(run) != "dead":
                continue
            try:
                state = client.read_flow_run(UUID(run)).state
            except ObjectNotFound:
                state = None  # on another Prefect server, or deleted
            if state and not state.is_final():
                message = "the process ended without reporting its state"
                client.set_flow_run_state(UUID(run), Crashed(message=message), force=True)
                log.warning("flow run %s: the process has ended; marked as crashed", run)
            lease_file(run).unlink(missing_ok=True)
        for stuck in find_stuck(client, datetime.now(UTC)):
            message = f"it did not begin to work within {STUCK}"
            client.set_flow_run_state(stuck.id, Crashed(message=message), force=True)
            log.warning("flow run %s: %s; marked as crashed", stuck.name, message)
    prune()
    tidy()


def tidy() -> None:
    """Remove what old runs left in the repository, in DVC's cache and in MLflow; an error is only logged."""
    # Takes seconds to import.
    from nightshift.registry.retention import drop_deleted_runs, drop_old_runs

    for act in (drop_old_runs, drop_deleted_runs):
        try:
            act()
        except PipelineError as err:
            get_run_logger().warning("%s", err)


def find_stuck(client: SyncPrefectClient, now: datetime) -> list[FlowRun]:
    """Return the runs that have been pending, running or cancelling for long without a lease."""
    kinds = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    active = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds)))
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=LEASED)), flow_run_filter=active
    )
    held = set(leased_runs())
    return [
        run
        for run in runs
        if str(run.id) not in held and run.state and run.state.timestamp and now - run.state.timestamp > STUCK
    ]
