"""Paths and ports of the local stack, and the settings that connect a process to it."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local import prefect_api
from infra.local.processes import HOST

HEARTBEAT_SECONDS = 30  # Prefect's minimum; the automation acts on a run that misses three
MARK = "# Written by `nightshift up`, removed by `nightshift down`; do not edit.\n"
# Variables of the user's shell that would connect a service to another database, profile or run.
FOREIGN = (
    *("PREFECT__", "PREFECT_API_", "PREFECT_PROFILE", "PREFECT_SERVER_", "MLFLOW_BACKEND_"),
    *("MLFLOW_DEFAULT_", "MLFLOW_REGISTRY_", "MLFLOW_RUN_ID", "MLFLOW_SERVER_"),
)


@dataclass(frozen=True, slots=True)
class Stack:
    """State folder and ports of the local stack."""

    state_dir: Path
    prefect_port: int
    mlflow_port: int

    @property
    def prefect_ui(self) -> str:
        """URL of the Prefect UI."""
        return f"http://{HOST}:{self.prefect_port}"

    @property
    def prefect_url(self) -> str:
        """URL of the Prefect API."""
        return f"{self.prefect_ui}/api"

    @property
    def mlflow_url(self) -> str:
        """URL of MLflow: UI, API and artifacts."""
        return f"http://{HOST}:{self.mlflow_port}"

    @property
    def auth_file(self) -> Path:
        """File with the `user:password` of Prefect's API."""
        return self.state_dir / "prefect-auth"

    @property
    def auth_string(self) -> str:
        """Content of `auth_file`; empty before the first `up`."""
        return self.auth_file.read_text() if self.auth_file.is_file() else ""

    def prefect(self, method: str, path: str, body: object = None) -> Any:
        """Call Prefect's API; see `infra.local.prefect_api.call`."""
        return prefect_api.call(self.prefect_url, self.auth_string, method, path, body)

    def log_file(self, service: str) -> Path:
        """Return the file with a service's output since its last start; `.log.1` is the start before."""
        return self.state_dir / "logs" / f"{service}.log"


def environment(stack: Stack) -> dict[str, str]:
    """Return the variables that connect a process to the stack, for merging into `os.environ`.

    The user's values take precedence for the variables in `switches`. The addresses, the heartbeat (the
    automation depends on it) and the ban on pickles are fixed.
    """
    switches = {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # only MLflow's built-in judges need it
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,nightshift,tasks",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    users = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    bypass = ",".join(filter(None, [users, HOST, "localhost"]))
    return {name: os.environ.get(name, value) for name, value in switches.items()} | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_REGISTRY_URI": stack.mlflow_url,
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        "NIGHTSHIFT_HOME": str(stack.state_dir),
        "NO_PROXY": bypass,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PREFECT_API_AUTH_STRING": stack.auth_string,
        "PREFECT_API_URL": stack.prefect_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_HOME": str(stack.state_dir / "prefect"),
        "no_proxy": bypass,
    }


def server_environment(stack: Stack) -> dict[str, str]:
    """Return the variables that secure the Prefect server, in addition to `environment`."""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": stack.auth_string,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": stack.prefect_ui,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(stack.prefect_port),
        # Runs, their logs and artifacts after 90 days.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # In memory, the default, a restart would lose the leases of the user's concurrency limits.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def service_environment(stack: Stack) -> dict[str, str]:
    """Return the environment of a service: the user's without the FOREIGN variables, and the stack's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    return kept | environment(stack)


def prefect_toml(stack: Stack) -> str:
    """Render the settings that connect a plain `prefect` command in this folder to the stack.

    The heartbeat is set for manually started flows: a slower one would trigger the automation.
    """
    home = stack.state_dir / "prefect"
    return f"""{MARK}home = {json.dumps(str(home), ensure_ascii=False)}
profiles_path = {json.dumps(str(home / "profiles.toml"), ensure_ascii=False)}
[api]
url = "{stack.prefect_url}"
auth_string = {json.dumps(stack.auth_string)}
[flows]
heartbeat_frequency = {HEARTBEAT_SECONDS}
[logging]
extra_loggers = "flows,nightshift,tasks"
to_api = {{ when_missing_flow = "ignore" }}
[server]
analytics_enabled = false
"""
