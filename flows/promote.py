"""Move the champion manually: approve a waiting candidate, or roll back."""

from prefect import flow
from prefect.runtime import flow_run

from flows.naming import add_tags, name_run
from flows.stages import run_program
from nightshift.pipeline.leases import lease


@flow(name="promote", flow_run_name=name_run, persist_result=False)
def promote(version: int, reason: str) -> None:
    """Make a version the champion.

    Args:
        version: Version of the registered model.
        reason: Reason, stored in the record.
    """
    add_tags([f"version {version}"])
    with lease(str(flow_run.id)):
        run_program("promote", None, (f"--version={version}", f"--reason={reason}"))


@flow(name="rollback", flow_run_name=name_run, persist_result=False)
def rollback(reason: str, version: int | None = None) -> None:
    """Restore the previous champion, and hold automatic promotion.

    Args:
        reason: Reason, stored in the record.
        version: Version to restore instead of the previous champion.
    """
    target = () if version is None else (f"--version={version}",)
    with lease(str(flow_run.id)):
        run_program("promote", None, ("--rollback", *target, f"--reason={reason}"))
