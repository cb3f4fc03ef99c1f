"""The nightly retraining: every stage of dvc.yaml, then what the gate allows."""

import time
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.naming import add_tags, name_run
from flows.nights import describe_missed_night
from flows.overrides import override_params
from flows.report import report
from flows.stages import run_program, run_stage
from flows.tracking import describe_run, link_training, tracked_run
from flows.workspace import published_results, push_results, remove_workspace
from nightshift.core.config import read_params
from nightshift.core.errors import StageError
from nightshift.core.files import read_json
from nightshift.core.paths import GATE
from nightshift.pipeline.graph import changed_stages, find_reruns, locked_outputs, stage_order
from nightshift.pipeline.leases import lease
from nightshift.pipeline.ledger import check_ledger
from nightshift.pipeline.outcome import MISSED, SKIPPED, describe_outcome
from nightshift.pipeline.scoreboard import collect
from nightshift.registry.freshness import find_reason_to_skip
from nightshift.tracking.runs import pinned_commit


@flow(name="finetune", flow_run_name=name_run, persist_result=False, on_completion=[remove_workspace])
def finetune(
    overrides: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    num_train_epochs: float | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    evaluate_limit: int | None = None,
) -> State[None]:
    """Retrain on new data, and promote the model if it is measurably better.

    Args:
        overrides: Any parameters for this run only, `section.key` -> value, validated like params.yaml:
            `--param overrides='{"sft.lora_r": 32}'`. The fields below are the usual ones; empty fields keep
            the value of params.yaml. Only a run of a deployment that has a workspace takes them.
        learning_rate: `sft.learning_rate`, the peak of the schedule.
        num_train_epochs: `sft.num_train_epochs`, passes over the training data.
        max_steps: `sft.max_steps`, optimizer steps instead of epochs.
        seed: `sft.seed`, of the adapter's initial weights and the order of the rows.
        evaluate_limit: `evaluate.limit`, the most items of each benchmark that are asked.

    Returns:
        Final state; its name is one of `nightshift.pipeline.outcome.OUTCOMES`.
    """
    if reason := describe_missed_night():
        return end(MISSED, reason, MISSED.lower())
    fields = {
        "sft.learning_rate": learning_rate,
        "sft.num_train_epochs": num_train_epochs,
        "sft.max_steps": max_steps,
        "sft.seed": seed,
        "evaluate.limit": evaluate_limit,
    }
    changes = (overrides or {}) | {key: value for key, value in fields.items() if value is not None}
    with lease(str(flow_run.id)), pinned_commit(), override_params(changes), published_results() as publish:
        run_stage("snapshot", None, force=True)
        publish("snapshot")
        may_run, decision = find_reruns(changed_stages()), locked_outputs().get("gate")
        with tracked_run(has_changed=bool(may_run)) as run_id:
            for stage in stage_order():
                if stage == "sft" and stage in may_run and (reason := find_reason_to_skip(time.time())):
                    describe_run(run_id, SKIPPED, reason)
                    return end(SKIPPED, reason, SKIPPED.lower())
                if stage != "snapshot":
                    run_stage(stage, run_id, may_run=stage in may_run)
            check_ledger()
            link_training(run_id)
            publish(read_json(GATE)["verdict"])
            ship(run_id)
            push_results()
            board = collect()
            is_judged = locked_outputs()["gate"] != decision
            name, message = describe_outcome(board, has_changed=bool(may_run), is_judged=is_judged)
            describe_run(run_id, name, message)
    return end(name, message, board["gate"]["verdict"], f"version {board['version']}")


def end(name: str, message: str, *tags: str) -> State[None]:
    """Tag the run, and return the final state that says how it ended."""
    add_tags(tags)
    get_run_logger().info("%s: %s", name, message)
    return Completed(name=name, message=message)


def ship(run_id: str | None) -> None:
    """Register and promote as the gate allows, then report; a gate error is reported, then raised.

    Args:
        run_id: MLflow run of the flow run, or None without new input.
    """
    try:
        run_program("register", run_id)
        run_program("promote", run_id)
        run_judge(run_id)
    finally:
        report(run_id)


def run_judge(run_id: str | None) -> None:
    """Let the judge model, if set, compare the generated answers; its failure never fails the night."""
    if read_params()["judge"]["model"] is None:
        return
    try:
        run_program("judge", run_id)
    except StageError as err:
        get_run_logger().warning("%s; the run continues without the judge", err)
