"""Move the champion by hand: the approval that a candidate waits for, and the way back."""

from prefect import flow

from flows.stages import run_program


@flow(name="promote", persist_result=False)
def promote(version: int, reason: str) -> None:
    """Make a version the champion.

    Args:
        version: Of the registered model.
        reason: Why; the record keeps it.
    """
    run_program("promote", "", (f"--version={version}", f"--reason={reason}"))


@flow(name="rollback", persist_result=False)
def rollback(reason: str, version: int | None = None) -> None:
    """Bring back the previous champion, and hold automatic promotion.

    Args:
        reason: Why; the record keeps it.
        version: Another one to go back to.
    """
    target = () if version is None else (f"--version={version}",)
    run_program("promote", "", ("--rollback", *target, f"--reason={reason}"))
