"""Run a deployment from the terminal: start it or join the active run, and show its training steps."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.local.settings import environment
from nightshift.core.errors import StageError

if TYPE_CHECKING:
    from infra.local.settings import Stack

POLL_SECONDS = 2.0
ACTIVE = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING")


def run_deployment(deployment: str, overrides: str, stack: "Stack") -> None:
    """Start a run of the deployment, or join the active run, and follow it to its end.

    An outage of the Prefect server does not end the run: it is joined again when the server is back.

    Args:
        deployment: Name of the deployment, `flow/deployment`.
        overrides: JSON for the flow parameter `overrides`, or an empty string.
        stack: Local stack.

    Raises:
        StageError: The run did not start or complete, or a run is active and cannot take overrides.
    """
    active = find_active(stack, deployment)
    if active and overrides:
        raise StageError(f"{deployment}: run {active['name']} is active; wait for it or cancel it")
    before = {run["id"] for run in list_runs(stack, deployment)} - {active and active["id"]}
    if active:
        command = ["flow-run", "watch", active["id"]]
    else:
        command = ["deployment", "run", deployment, "--watch"]
        command += ["--param", f"overrides={overrides}"] if overrides else []
    ended = threading.Event()
    threading.Thread(target=show_steps, args=(stack, ended), daemon=True).start()
    try:
        while not prefect(stack, *command):
            run = next((run for run in await_runs(stack, deployment) if run["id"] not in before), None)
            if run is None:
                raise StageError(f"{deployment}: no run was started; see the output above")
            if run["state_type"] not in ACTIVE:
                raise StageError(f"{deployment}: {describe_failure(stack, run)}")
            command = ["flow-run", "watch", run["id"]]
    except KeyboardInterrupt as err:
        raise StageError(
            f"{deployment}: no longer watched, but the run continues: `make run` joins it, "
            "`make down` cancels it"
        ) from err
    finally:
        ended.set()


def prefect(stack: "Stack", *arguments: str) -> bool:
    """Run a `prefect` command in this terminal, and return whether it succeeded."""
    command = [str(Path(sys.executable).with_name("prefect")), *arguments]
    return not subprocess.run(command, env={**os.environ, **environment(stack)}, check=False).returncode


def await_runs(stack: "Stack", deployment: str) -> list[dict[str, Any]]:
    """Return the runs of the deployment, newest first; wait while the server is unreachable."""
    is_warned = False
    while True:
        try:
            return list_runs(stack, deployment, sort="EXPECTED_START_TIME_DESC")
        except StageError:
            if not is_warned:
                sys.stderr.write(
                    "Prefect does not respond; the run continues, `nightshift up` restarts the server\n"
                )
            is_warned = True
            time.sleep(POLL_SECONDS)


def describe_failure(stack: "Stack", run: dict[str, Any]) -> str:
    """Describe why a run did not complete, and where its log is."""
    page = f"{stack.prefect_ui}/runs/flow-run/{run['id']}"
    return f"run {run['name']} {run['state_name']}: {run['state']['message']}; its log is at {page}"


def show_steps(stack: "Stack", ended: threading.Event) -> None:
    """Print the latest training step whenever it changes, until the run has ended."""
    latest = None
    while not ended.wait(POLL_SECONDS):
        try:
            line = read_progress(stack)
        except StageError:
            continue
        if latest not in (None, line):
            sys.stdout.write(f"  {line}\n")
            sys.stdout.flush()
        latest = line


def read_progress(stack: "Stack") -> str:
    """Return the text of the latest progress artifact, or an empty string."""
    body = {"artifacts": {"type": {"any_": ["progress"]}}, "sort": "UPDATED_DESC", "limit": 1}
    found = stack.prefect("POST", "/artifacts/filter", body)
    return str(found[0]["description"]) if found else ""


def find_active(stack: "Stack", deployment: str) -> dict[str, Any] | None:
    """Return the oldest running or waiting run of the deployment, or None.

    A run that is scheduled for a later night does not count.
    """
    active = {"state": {"type": {"any_": list(ACTIVE)}}}
    runs = list_runs(stack, deployment, sort="EXPECTED_START_TIME_ASC", flow_runs=active)
    return next((run for run in runs if not run["auto_scheduled"]), None)


def list_runs(stack: "Stack", deployment: str, **more: Any) -> list[dict[str, Any]]:
    """List the flow runs of `flow/deployment`, sorted and filtered by Prefect."""
    flow, name = deployment.split("/")
    body = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}, **more}
    runs: list[dict[str, Any]] = stack.prefect("POST", "/flow_runs/filter", body)
    return runs
