"""The nightly retraining: every stage of dvc.yaml, then what the gate allows."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.naming import add_tags, name_run
from flows.overrides import override_params
from flows.report import report
from flows.stages import run_program, run_stage
from flows.tracking import tracked_run
from nightshift.core.config import read_params
from nightshift.core.errors import StageError
from nightshift.pipeline.graph import changed_stages, find_reruns, stage_order
from nightshift.pipeline.leases import lease
from nightshift.pipeline.ledger import check_ledger
from nightshift.pipeline.outcome import describe_outcome
from nightshift.pipeline.scoreboard import collect


@flow(name="finetune", flow_run_name=name_run, persist_result=False)
def finetune(overrides: dict[str, Any] | None = None) -> State[None]:
    """Retrain on new data, and promote the model if it is measurably better.

    Args:
        overrides: Parameters for this run only, `section.key` -> value, validated like params.yaml:
            `--param overrides='{"sft.num_train_epochs": 2}'`.

    Returns:
        Final state; its name is one of `nightshift.pipeline.outcome.OUTCOMES`.
    """
    with lease(str(flow_run.id)), override_params(overrides or {}), tracked_run() as run_id:
        run_stage("snapshot", run_id, force=True)
        may_run = find_reruns(changed_stages())
        for stage in stage_order():
            if stage != "snapshot":
                run_stage(stage, run_id, may_run=stage in may_run)
        check_ledger()
        ship(run_id)
        board = collect()
    name, message = describe_outcome(board, has_changed=bool(may_run))
    add_tags([board["gate"]["verdict"], f"version {board['version']}"])
    get_run_logger().info("%s: %s", name, message)
    return Completed(name=name, message=message)


def ship(run_id: str) -> None:
    """Register and promote as the gate allows, then report; a gate error is reported, then raised.

    Args:
        run_id: MLflow run of the flow run.
    """
    try:
        run_program("register", run_id)
        run_program("promote", run_id)
        run_judge(run_id)
    finally:
        report(run_id)


def run_judge(run_id: str) -> None:
    """Let the judge model, if set, compare the generated answers; its failure never fails the night."""
    if read_params()["judge"]["model"] is None:
        return
    try:
        run_program("judge", run_id)
    except StageError as err:
        get_run_logger().warning("%s; the run continues without the judge", err)
