"""Mark silent flow runs as crashed if their process is dead, and no others.

An automation starts it when a run misses three heartbeats. A busy machine or an unreachable Prefect
server is enough for that; only the lease of the run proves that its process has ended.
"""

from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from nightshift.pipeline.leases import lease_file, lease_holder, leased_runs


@flow(name="janitor", persist_result=False)
def janitor() -> None:
    """Release the queue slots of dead runs."""
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
