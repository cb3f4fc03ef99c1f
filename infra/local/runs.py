"""Configure the local Prefect server, and settle flow runs when parts of the stack end."""

import contextlib
import datetime
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from infra.local import processes
from nightshift.pipeline.leases import lease_file, lease_holder
from nightshift.pipeline.outcome import MISSED, OUTCOMES

if TYPE_CHECKING:
    from infra.local.settings import Stack

POOL = "nightshift"
CANCEL_SECONDS = 45
ACTIVE = ("PENDING", "RUNNING", "CANCELLING")
AUTOMATION = "look-after-silent-runs"
FORMER_AUTOMATION = "crash-zombie-flows"  # marked runs as crashed based on heartbeats alone
# How far back, and how many, nights are recorded as missed.
MISSED_SINCE, MISSED_RUNS = datetime.timedelta(days=100), 200
JANITOR = ("janitor", "local")  # flow and deployment
log = logging.getLogger(__name__)


def create_pool(stack: "Stack") -> None:
    """Create the work pool, or update its template: jobs cannot set a command, folder or environment.

    Otherwise every user who may start a run could make the worker execute arbitrary commands.
    """
    command = [sys.executable, "-P", "-m", "infra.local.outlast", "prefect.engine"]
    template = {
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
        "job_configuration": {
            "command": shlex.join(command),
            "env": {},
            "labels": {},
            "name": None,
            "stream_output": True,
            "working_dir": None,
        },
    }
    if stack.prefect("POST", "/work_pools/filter", {"work_pools": {"name": {"any_": [POOL]}}}):
        stack.prefect("PATCH", f"/work_pools/{POOL}", {"base_job_template": template})
    else:
        stack.prefect(
            "POST", "/work_pools/", {"name": POOL, "type": "process", "base_job_template": template}
        )


def limit_queues(stack: "Stack") -> None:
    """Limit each queue to one run at a time, across all deployments."""
    queues = f"/work_pools/{POOL}/queues"
    for queue in stack.prefect("POST", f"{queues}/filter", {}):
        stack.prefect("PATCH", f"{queues}/{queue['name']}", {"concurrency_limit": 1})


def read_deployments(stack: "Stack") -> list[dict[str, Any]]:
    """Return the deployments that the worker runs."""
    body = {"work_pools": {"name": {"any_": [POOL]}}}
    found: list[dict[str, Any]] = stack.prefect("POST", "/deployments/filter", body)
    return found


def end_schedules(stack: "Stack", path: Path) -> None:
    """Delete the schedules that a prefect.yaml no longer has; `prefect deploy` only adds and replaces."""
    declared = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    scheduled = {(one["entrypoint"], one["name"]) for one in declared if one.get("schedules")}
    for deployment in read_deployments(stack):
        if (deployment["entrypoint"], deployment["name"]) not in scheduled:
            for schedule in deployment["schedules"]:
                stack.prefect("DELETE", f"/deployments/{deployment['id']}/schedules/{schedule['id']}")
                log.info("%s: its schedule is not in %s, and ends", deployment["name"], path)


def schedule_missed_nights(stack: "Stack", now: datetime.datetime) -> None:
    """Schedule the nights between the last one and now; all but the newest end as Missed, with the reason.

    While the servers are down, Prefect plans nothing, and a deployment replaces what it planned before.
    """
    for deployment in read_deployments(stack):
        is_scheduled = any(schedule["active"] for schedule in deployment["schedules"])
        if not is_scheduled or deployment["name"] == JANITOR[1]:
            continue
        nights: dict[str, Any] = {
            "deployments": {"id": {"any_": [deployment["id"]]}},
            "flow_runs": {
                "expected_start_time": {"before_": now.isoformat()},
                "tags": {"all_": ["auto-scheduled"]},
            },
            "sort": "EXPECTED_START_TIME_DESC",
        }
        if not (known := stack.prefect("POST", "/flow_runs/filter", {**nights, "limit": 1})):
            continue
        last = datetime.datetime.fromisoformat(known[0]["expected_start_time"])
        start = max(last + datetime.timedelta(seconds=1), now - MISSED_SINCE)
        span = {"start_time": start.isoformat(), "end_time": now.isoformat()}
        most = {"min_time": (now - start).total_seconds(), "min_runs": 1, "max_runs": MISSED_RUNS}
        stack.prefect("POST", f"/deployments/{deployment['id']}/schedule", {**span, **most})
        nights["flow_runs"]["state"] = {"type": {"any_": ["SCHEDULED"]}}
        for run in stack.prefect("POST", "/flow_runs/filter", nights)[1:]:
            reason = "the servers were down; a newer night trains on all that has arrived"
            set_state(stack, run, "Completed", reason, shown=MISSED)


def next_runs(stack: "Stack", limit: int) -> list[tuple[datetime.datetime, str]]:
    """Return the local start time and the deployment of the next scheduled runs, without the janitor's."""
    body = {
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "work_pools": {"name": {"any_": [POOL]}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    names = {one["id"]: one["name"] for one in read_deployments(stack)}
    found = stack.prefect("POST", "/flow_runs/filter", body)
    nights = [
        (
            datetime.datetime.fromisoformat(run["expected_start_time"]).astimezone(),
            names[run["deployment_id"]],
        )
        for run in found
        if names[run["deployment_id"]] != JANITOR[1]
    ]
    return nights[:limit]


def create_automation(stack: "Stack") -> None:
    """Start the janitor when a run, other than a janitor run, misses three heartbeats.

    The automation is created once: the user may disable it, and an update would disarm it.
    """
    flow, name = JANITOR
    body = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}}
    deployments = stack.prefect("POST", "/deployments/filter", body)
    if not deployments:
        return
    action = {"type": "run-deployment", "source": "selected", "deployment_id": deployments[0]["id"]}
    # A short run's heartbeat can arrive after its end. A janitor's would start the next one, endlessly.
    others = {"prefect.resource.role": "flow", "prefect.resource.name": f"!{flow}"}
    signs = ["heartbeat", "Completed", "Failed", "Cancelled", "Crashed", "Cancelling"]
    # The event of a state has the state's name.
    signs += ["Paused", "AwaitingRetry", "Suspended", *OUTCOMES]
    expected = [f"prefect.flow-run.{sign}" for sign in signs]
    is_enabled = True
    known = {"automations": {"name": {"any_": [AUTOMATION, FORMER_AUTOMATION]}}}
    for automation in stack.prefect("POST", "/automations/filter", known):
        # The user may have edited it, even into a compound trigger or without an action.
        trigger = automation["trigger"]
        if (
            automation["name"] == AUTOMATION
            and trigger.get("match_related") == others
            and set(trigger.get("expect", ())) == set(expected)
            and any(action.items() <= one.items() for one in automation["actions"])
        ):
            return
        is_enabled = automation["enabled"]
        stack.prefect("DELETE", f"/automations/{automation['id']}")
    automation = {
        "name": AUTOMATION,
        "description": "Three consecutive heartbeats are missing: the janitor checks the process.",
        "enabled": is_enabled,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
            "match_related": others,
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            # Any other event of the run counts as a sign of life.
            "expect": expected,
            "threshold": 1,
            "within": 90,
        },
        "actions": [action],
    }
    stack.prefect("POST", "/automations/", automation)


def active_runs(stack: "Stack") -> list[dict[str, Any]]:
    """List the pool's flow runs that hold a process and a slot of their queue."""
    active = {"state": {"type": {"any_": ACTIVE}}}
    body = {"work_pools": {"name": {"any_": [POOL]}}, "flow_runs": active}
    return list(stack.prefect("POST", "/flow_runs/filter", body))


def run_processes(home: Path) -> list[tuple[str, psutil.Process]]:
    """List (flow run id, process) of this stack, found by environment variables, including orphans."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            inherited = process.environ()
            run = inherited.get("PREFECT__FLOW_RUN_ID")
            if run and inherited.get("NIGHTSHIFT_HOME") == str(home):
                found.append((run, process))
    return found


def end_run_processes(home: Path) -> None:
    """End the processes of all flow runs of this stack."""
    processes.end([process for _, process in run_processes(home)])


def recover_runs(stack: "Stack") -> None:
    """Settle the active runs after their worker is gone; live runs are left alone.

    A run whose process is dead is marked as crashed; a run without a process is rescheduled.
    """
    begun = {run for run, _ in run_processes(stack.state_dir)}
    for run in active_runs(stack):
        holder = lease_holder(run["id"])
        if holder in ("alive", "elsewhere") or (holder is None and run["id"] in begun):
            log.info("flow run %s continues without the worker that started it", run["name"])
        elif holder is None and run["state"]["type"] == "PENDING":
            set_state(stack, run, "Scheduled", "the worker ended before the run started")
        else:
            set_state(stack, run, "Crashed", "its process was gone when the stack started")
            lease_file(run["id"]).unlink(missing_ok=True)


def set_state(stack: "Stack", run: dict[str, Any], name: str, message: str, shown: str = "") -> None:
    """Force the state of a run past Prefect's orchestration rules; Cancelling stays subject to them.

    Args:
        stack: Local stack.
        run: Flow run.
        name: Kind of the state.
        message: Message of the state.
        shown: Name of the state, if not that of its kind.
    """
    state: dict[str, Any] = {"type": name.upper(), "name": shown or name, "message": message}
    if name == "Scheduled":
        now = datetime.datetime.now(datetime.UTC).isoformat()
        state["state_details"] = {"scheduled_time": now}
    body = {"state": state, "force": name != "Cancelling"}
    stack.prefect("POST", f"/flow_runs/{run['id']}/set_state", body)
    log.info("flow run %s: %s, %s", run["name"], name.lower(), message)


def cancel(stack: "Stack", worker: psutil.Process | None) -> None:
    """Let the worker cancel its runs, then end it; the pool is paused so that no queued run starts."""
    pool = f"/work_pools/{POOL}"
    if worker:
        was_paused = stack.prefect("GET", pool)["is_paused"]
        stack.prefect("PATCH", pool, {"is_paused": True})
        try:
            for run in active_runs(stack):
                set_state(stack, run, "Cancelling", "the stack is shutting down")
            deadline = time.monotonic() + CANCEL_SECONDS
            while active_runs(stack) and time.monotonic() < deadline:
                time.sleep(0.5)
            processes.end([worker])
        finally:
            stack.prefect("PATCH", pool, {"is_paused": was_paused})
    left = active_runs(stack)
    end_run_processes(stack.state_dir)
    for run in left:
        # A terminated process reports a crash itself, but without the reason.
        now = stack.prefect("GET", f"/flow_runs/{run['id']}")["state"]["type"]
        if now in (*ACTIVE, "CRASHED"):
            set_state(stack, run, "Crashed", "the stack was shut down")
            lease_file(run["id"]).unlink(missing_ok=True)
