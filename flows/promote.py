"""Move the champion by hand: the approval that a candidate waits for, and the way back."""

from prefect import flow
from prefect.runtime import flow_run

from flows.stages import run_program
from nightshift.pipeline.leases import lease


@flow(name="promote", persist_result=False)
def promote(version: int, reason: str) -> None:
    """Make a version the champion.

    Args:
        version: Of the registered model.
        reason: Why; the record keeps it.
    """
    with lease(str(flow_run.id)):
        run_program("promote", "", (f"--version={version}", f"--reason={reason}"))


@flow(name="rollback", persist_result=False)
def rollback(reason: str, version: int | None = None) -> None:
    """Bring back the previous champion, and hold automatic promotion.

    Args:
        reason: Why; the record keeps it.
        version: Another one to go back to.
    """
    target = () if version is None else (f"--version={version}",)
    with lease(str(flow_run.id)):
        run_program("promote", "", ("--rollback", *target, f"--reason={reason}"))
