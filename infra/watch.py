"""Run a deployment from the terminal: start it, or join the run under way, and show its training steps."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.stack import request
from tasks.errors import StageError

POLL_SECONDS = 2.0
ACTIVE = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING")


def run_deployment(deployment: str, overrides: str, env: Mapping[str, str]) -> None:
    """Start a run of the deployment, or join the one under way, and follow it to its end.

    Args:
        deployment: `flow/deployment`.
        overrides: JSON for the flow's parameter `overrides`, or empty.
        env: Environment of the local stack.

    Raises:
        StageError: The run did not complete, or another one is under way and cannot take overrides.
    """
    api = env["PREFECT_API_URL"]
    active = find_active(api, deployment)
    if active and overrides:
        raise StageError(f"{deployment}: run {active['name']} is under way; wait for it or cancel it")
    if active:
        command = ["flow-run", "watch", active["id"]]
    else:
        command = ["deployment", "run", deployment, "--watch"]
        command += ["--param", f"overrides={overrides}"] if overrides else []
    ended = threading.Event()
    ticker = threading.Thread(target=show_steps, args=(api, ended), daemon=True)
    ticker.start()
    prefect = str(Path(sys.executable).with_name("prefect"))
    try:
        code = subprocess.run([prefect, *command], env={**os.environ, **env}, check=False).returncode
    except KeyboardInterrupt as err:
        raise StageError(
            f"{deployment}: no longer watched, but the run goes on: `make run` joins it, "
            "`make down` cancels it"
        ) from err
    finally:
        ended.set()
    if code:
        raise StageError(f"{deployment}: {read_failure(api, deployment)}")


def read_failure(api: str, deployment: str) -> str:
    """Say why the last run of the deployment did not complete, and where its log is."""
    run = list_runs(api, deployment, sort="START_TIME_DESC", limit=1)[0]
    page = f"{api.removesuffix('/api')}/runs/flow-run/{run['id']}"
    return f"run {run['name']} {run['state_name']}: {run['state']['message']}; its log is at {page}"


def show_steps(api: str, ended: threading.Event) -> None:
    """Print the newest training step whenever it changes, until the run has ended."""
    latest = None
    while not ended.wait(POLL_SECONDS):
        try:
            line = read_progress(api)
        except StageError:
            # The server is gone; what watches the run says so.
            continue
        if latest not in (None, line):
            sys.stdout.write(f"  {line}\n")
            sys.stdout.flush()
        latest = line


def read_progress(api: str) -> str:
    """Return the text of the newest progress artefact, or nothing."""
    body = {"artifacts": {"type": {"any_": ["progress"]}}, "sort": "UPDATED_DESC", "limit": 1}
    found = request("POST", f"{api}/artifacts/filter", body)
    return str(found[0]["description"]) if found else ""


def find_active(api: str, deployment: str) -> dict[str, Any] | None:
    """Return the oldest run of the deployment that has begun or waits to, or None.

    A run that the schedule has planned for a later night does not count.
    """
    active = {"state": {"type": {"any_": list(ACTIVE)}}}
    runs = list_runs(api, deployment, sort="EXPECTED_START_TIME_ASC", flow_runs=active)
    return next((run for run in runs if not run["auto_scheduled"]), None)


def list_runs(api: str, deployment: str, **more: Any) -> list[dict[str, Any]]:
    """List the flow runs of `flow/deployment`, sorted and filtered by Prefect."""
    flow, name = deployment.split("/")
    body = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}, **more}
    runs: list[dict[str, Any]] = request("POST", f"{api}/flow_runs/filter", body)
    return runs
