"""Prefect pull step: make the workspace in which a run of a deployment works, and load the flow from it."""

import os
import subprocess
import sys

# A flow run imports `nightshift` from its workspace, so it must not be imported here.
PROGRAM = "nightshift.pipeline.workspaces"


def make_workspace(checkout: str) -> dict[str, str]:
    """Make a workspace of a checkout.

    Args:
        checkout: Folder from which the flow was deployed.

    Returns:
        `directory`: path of the workspace, which Prefect enters.

    Raises:
        RuntimeError: It failed; the message is that of the program.
    """
    command = [sys.executable, "-m", PROGRAM, os.environ["PREFECT__FLOW_RUN_ID"]]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{checkout}: no workspace: {done.stderr.strip()}")
    return {"directory": done.stdout.splitlines()[-1]}
