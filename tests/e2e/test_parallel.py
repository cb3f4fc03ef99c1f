"""Twenty runs at once, with overrides, while somebody edits the checkout: `make test-long`."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from nightshift.core.ports import free_port
from nightshift.pipeline.graph import stage_order
from tests.helpers.checkouts import ServedCheckout, make_checkout

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
RUNS, TWINS = 20, 2
COMMIT = "mlflow.source.git.commit"


class Editor:
    """Somebody who changes params.yaml every second, and notices when a change is lost."""

    def __init__(self, file: Path) -> None:
        self._file, self._text = file, file.read_text()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._edit)
        self.edits, self.lost = 0, 0

    def __enter__(self) -> "Editor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _edit(self) -> None:
        while not self._is_done.wait(1):
            self.lost += self._file.read_text() != self._text
            self.edits += 1
            self._text += f"# edit {self.edits}\n"
            self._file.write_text(self._text)


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str]) -> Iterator[ServedCheckout]:
    """Create a checkout with a trained model."""
    folder = make_checkout(tmp_path / "checkout", tiny_base)
    ports = {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    made = ServedCheckout(folder, clean_environment | ports)
    try:
        made.type("nightshift", "run")
        yield made
    finally:
        made.type("nightshift", "down")


def test_twenty_runs_at_once_lose_no_edit_and_compute_nothing_twice(checkout: ServedCheckout) -> None:
    checkout.type(
        "prefect", "work-queue", "set-concurrency-limit", "default", str(RUNS), "--pool", "nightshift"
    )
    (deployment,) = checkout.api("/deployments/filter", {"deployments": {"name": {"any_": ["prod"]}}})
    before = git(checkout, "rev-parse", "HEAD")
    with Editor(checkout.folder / "params.yaml") as editor:
        alphas = [0.01 + 0.001 * (number // TWINS) for number in range(RUNS)]
        started = [
            checkout.api(
                f"/deployments/{deployment['id']}/create_flow_run",
                {"parameters": {"overrides": {"gate.alpha": alpha}}},
            )["id"]
            for alpha in alphas
        ]
        runs = wait_for(checkout, started)
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    assert (editor.lost, editor.edits > 60) == (0, True)
    assert git(checkout, "rev-parse", "HEAD") == before

    # Each result is computed by one run only; its twin finds it in the cache.
    states = Counter((task["name"], task["state_name"]) for task in tasks_of(checkout, started))
    computed = {stage: states[stage, "Completed"] for stage in stage_order()}
    assert computed.pop("snapshot") == RUNS
    assert computed.pop("gate") == RUNS // TWINS
    assert set(computed.values()) == {0}

    # The commit that was cloned is the one that is recorded.
    client = MlflowClient(f"sqlite:///{checkout.folder / '.nightshift' / 'mlflow.db'}")
    recorded = {
        run.info.run_name: run.data.tags[COMMIT] for run in client.search_runs(["1"], max_results=100)
    }
    branches = git(checkout, "for-each-ref", "--format=%(refname:lstrip=3)", "refs/heads/runs").split()
    parents = {git(checkout, "rev-parse", f"runs/{branch}^") for branch in branches}
    assert len(parents) >= RUNS // TWINS
    assert parents <= set(recorded.values())


def git(checkout: ServedCheckout, *arguments: str) -> str:
    return checkout.type("git", *arguments).strip()


def wait_for(checkout: ServedCheckout, runs: list[str]) -> list[dict[str, Any]]:
    """Wait until the runs have ended, and return them."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    while True:
        found: list[dict[str, Any]] = checkout.api("/flow_runs/filter", {"flow_runs": {"id": {"any_": runs}}})
        if all(run["state_type"] in final for run in found):
            return found
        time.sleep(2)


def tasks_of(checkout: ServedCheckout, runs: list[str]) -> list[dict[str, Any]]:
    """Return the tasks of the runs, of which the server gives 200 at once."""
    return [
        task
        for run in runs
        for task in checkout.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    ]
