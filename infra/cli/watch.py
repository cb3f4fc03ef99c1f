"""Run a deployment from the terminal: start it or join the active run, and show its stages as they run."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from infra.local.prefect_api import UnreachableError
from infra.local.processes import read_records
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import read_json
from nightshift.core.paths import DATA, GATE, OUTCOME, PAGE, VERSION
from nightshift.core.state import WORKSPACES, state_dir

if TYPE_CHECKING:
    from infra.local.settings import Stack

POLL_SECONDS = 1.0
# Time between two lines about a stage that is running, where no bar is shown.
LINE_SECONDS = 300.0
# States of a flow run that has not ended.
ACTIVE = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(slots=True)
class Stage:
    """One stage or program of the run, as Prefect reports it.

    Attributes:
        name: Stage name.
        state: State in words, such as running, completed, skipped or failed.
        seconds: Run time so far, in seconds.
        has_ended: Whether it has ended.
        percent: Progress, 0 to 100, or None if it reports none.
        figures: Key figures: progress while it runs, its result afterwards.
    """

    name: str
    state: str
    seconds: float
    has_ended: bool
    percent: float | None = None
    figures: str = ""


def run_deployment(deployment: str, overrides: dict[str, Any], stack: "Stack", console: Console) -> str:
    """Start a run of the deployment, or join the active run, and follow it to its end.

    An outage of the Prefect server does not end the run: it is followed again when the server is back.

    Args:
        deployment: Name of the deployment, `flow/deployment`.
        overrides: Parameters of this run, from `parse_overrides`.
        stack: Local stack.
        console: Terminal, file or pipe to print to.

    Returns:
        How the run ended: name and message of its final state.

    Raises:
        StageError: The run did not start or complete, or a run is active and cannot take overrides.
    """
    run = find_active(stack, deployment)
    if run and overrides:
        raise StageError(f"{deployment}: run {run['name']} is active; wait for it or cancel it")
    is_joined = run is not None
    run = run or start_run(stack, deployment, overrides)
    page = f"{stack.prefect_ui}/runs/flow-run/{run['id']}"
    start = f"{'joined' if is_joined else 'started'} a run of {deployment}: {page}"
    console.print(start, highlight=False, soft_wrap=True)
    try:
        run = follow(stack, run["id"], console, is_here=deployment.endswith("/here"))
    except KeyboardInterrupt as err:
        raise StageError(
            f"{deployment}: no longer watched, but the run continues: `make run` joins it, "
            "`make down` cancels it"
        ) from err
    ending = f"{run['state_name']}: {run['state']['message']}"
    if run["state_type"] != "COMPLETED":
        raise StageError(f"{deployment}: run {run['name']} {ending}; its log is at {page}")
    return ending


def parse_overrides(text: str) -> dict[str, Any]:
    """Return the overrides of a run, without checking keys and values.

    Raises:
        ConfigError: The text is not a JSON object.

    Example:
        >>> parse_overrides('{"sft.seed": 7}'), parse_overrides("")
        ({'sft.seed': 7}, {})
    """
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as err:
        raise ConfigError(f"--overrides: not JSON: {err}; write it as '{{\"sft.seed\": 7}}'") from err
    if not isinstance(values, dict):
        raise ConfigError(f"--overrides: {text} is not a JSON object; write it as '{{\"sft.seed\": 7}}'")
    return values


def start_run(stack: "Stack", deployment: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Start a run of the deployment and return it."""
    found = stack.prefect("GET", f"/deployments/name/{deployment}")
    body = {"parameters": {"overrides": overrides}} if overrides else {}
    run: dict[str, Any] = stack.prefect("POST", f"/deployments/{found['id']}/create_flow_run", body)
    return run


def follow(stack: "Stack", run_id: str, console: Console, *, is_here: bool) -> dict[str, Any]:
    """Show the stages of a run until it has ended; return the run.

    Args:
        stack: Local stack.
        run_id: Id of the flow run.
        console: Terminal, file or pipe to print to.
        is_here: Whether the run works in this folder instead of a workspace.

    Raises:
        StageError: The servers were stopped.
    """
    is_warned = False
    with shown_stages(console) as show:
        while True:
            try:
                # In this order: the stages of a run that has ended are final.
                run: dict[str, Any] = stack.prefect("GET", f"/flow_runs/{run_id}")
                stages = read_stages(stack, run_id, Path() if is_here else find_workspace(run_id))
            except UnreachableError as err:
                if not read_records(stack.state_dir):
                    raise StageError("the servers were stopped; `make run` starts them again") from err
                if not is_warned:
                    console.print(
                        "Prefect does not respond; the run continues, `nightshift up` restarts the server"
                    )
                is_warned = True
                time.sleep(POLL_SECONDS)
                continue
            show(stages)
            if run["state_type"] in ENDED:
                return run
            time.sleep(POLL_SECONDS)


@contextmanager
def shown_stages(console: Console) -> Iterator[Callable[[list[Stage]], None]]:
    """Yield a function that shows the stages of a run.

    In a terminal, a stage is one line that changes until it has ended, with a progress bar if it reports
    progress. Elsewhere (a pipe, a file), a line is printed when a stage starts, every `LINE_SECONDS`, and
    when it has ended.
    """
    # Stage -> run time in its last line, in seconds.
    printed, ended = dict[str, float](), set[str]()

    def print_lines(stages: list[Stage]) -> None:
        for stage in stages:
            if stage.has_ended and stage.name not in ended:
                console.print(escape(describe(stage)), highlight=False, soft_wrap=True)
                ended.add(stage.name)
            elif not (console.is_terminal or stage.has_ended):
                if stage.name not in printed:
                    console.print(f"{stage.name:<14}started", highlight=False)
                elif stage.seconds - printed[stage.name] >= LINE_SECONDS:
                    console.print(escape(describe(stage)), highlight=False, soft_wrap=True)
                else:
                    continue
                printed[stage.name] = stage.seconds

    if not console.is_terminal:
        yield print_lines
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(stages: list[Stage]) -> None:
            print_lines(stages)
            live.update(running_table(stages), refresh=True)

        yield show


def running_table(stages: list[Stage]) -> Table:
    """Lay out the stages that are running, with a progress bar if they report progress."""
    table = Table.grid(padding=(0, 1))
    for stage in stages:
        if not stage.has_ended:
            cells: list[Any] = [
                f"{stage.name:<13}",
                f"{stage.state:<10}",
                f"{format_seconds(stage.seconds):>8}",
            ]
            if stage.percent is not None:
                cells.append(ProgressBar(total=100, completed=stage.percent, width=20))
            table.add_row(*cells, escape(stage.figures))
    return table


def find_workspace(run_id: str) -> Path | None:
    """Return the workspace of a run; None before it is made, or after it is removed."""
    return next((state_dir() / WORKSPACES).glob(f"*-{run_id[:8]}"), None)


def read_stages(stack: "Stack", run_id: str, folder: Path | None) -> list[Stage]:
    """Return the stages of a run in the order in which they started, with their figures.

    Args:
        stack: Local stack.
        run_id: Id of the flow run.
        folder: Folder in which the run works; None if it is gone, and the figures with it.
    """
    this_run = {"flow_runs": {"id": {"any_": [run_id]}}}
    runs = stack.prefect("POST", "/task_runs/filter", {**this_run, "sort": "EXPECTED_START_TIME_ASC"})
    body = {**this_run, "artifacts": {"type": {"any_": ["progress"]}}, "sort": "UPDATED_DESC"}
    # A retry creates another artifact with the same key; the latest one counts.
    reports = reversed(stack.prefect("POST", "/artifacts/filter", body))
    progress = {found["key"].removesuffix("-progress"): found for found in reports if found["key"]}
    stages = []
    for run in runs:
        if run["start_time"] is None and run["state_type"] not in ENDED:
            continue
        stage = Stage(
            name=run["name"],
            state=run["state_name"].lower(),
            seconds=run["total_run_time"] if run["state_type"] in ENDED else run["estimated_run_time"],
            has_ended=run["state_type"] in ENDED,
        )
        if stage.has_ended and folder:
            # The run may be one whose files are not here, or no longer.
            with suppress(OSError, KeyError):
                stage.figures = result_of(stage.name, folder) if run["state_type"] == "COMPLETED" else ""
        elif not stage.has_ended and (found := progress.get(stage.name)):
            stage.percent, stage.figures = float(found["data"]), str(found["description"])
        stages.append(stage)
    return stages


def describe(stage: Stage) -> str:
    """Describe a stage in one line.

    Example:
        >>> describe(Stage("dedupe", "completed", 1.24, has_ended=True, figures="2,100 → 970 rows"))
        'dedupe        completed      1.2 s  2,100 → 970 rows'
    """
    return f"{stage.name:<14}{stage.state:<11}{format_seconds(stage.seconds):>9}  {stage.figures}".rstrip()


def format_seconds(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> format_seconds(1.24), format_seconds(64), format_seconds(3725)
        ('1.2 s', '1:04', '1:02:05')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def result_of(stage: str, folder: Path) -> str:
    """Return the key figures of a completed stage, from the files that it wrote; empty without any."""
    match stage:
        case "gate":
            return str(read_json(folder / GATE)["verdict"])
        case "register":
            return f"version {read_json(folder / VERSION)['version']}"
        case "promote":
            return "promoted" if read_json(folder / OUTCOME)["promoted"] else "not promoted"
        case "report":
            return str(PAGE)
    file = folder / DATA / stage / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    match stage:
        case "snapshot":
            return f"{sum(summary['shards'].values())} shards"
        case "sft" | "prefer" if "steps" in summary:
            return f"{summary['steps']:,} steps, {summary['tokens']:,} tokens"
        case "split":
            sides = summary["rows_out_by_side"]
            return ", ".join(f"{sides[side]:,} {side}" for side in ("train", "validation", "test"))
        case "evaluate":
            return f"{summary['rows_out']:,} answers and losses scored"
    rows_in, rows_out = summary.get("rows_in"), summary.get("rows_out")
    return f"{rows_in:,} → {rows_out:,} rows" if rows_in else ""


def find_active(stack: "Stack", deployment: str) -> dict[str, Any] | None:
    """Return the oldest active or queued run of the deployment, or None.

    A run that the schedule has planned for a later night does not count.
    """
    flow, name = deployment.split("/")
    body = {
        "flows": {"name": {"any_": [flow]}},
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"state": {"type": {"any_": list(ACTIVE)}}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    runs = stack.prefect("POST", "/flow_runs/filter", body)
    return next((run for run in runs if not run["auto_scheduled"]), None)
