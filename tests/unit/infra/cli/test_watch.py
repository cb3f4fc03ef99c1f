"""What `nightshift run` shows: the stages of a run, in a pipe and in a terminal."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.cli import watch
from infra.cli.watch import find_active, parse_overrides, run_deployment
from infra.local.prefect_api import UnreachableError
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import write_json

Polls = list[tuple[str, list[dict[str, Any]]]]


def task(name: str, state: str, seconds: float = 0.0, state_type: str = "") -> dict[str, Any]:
    """A task run, as Prefect's API returns it."""
    return {
        "name": name,
        "state_name": state,
        "state_type": state_type or state.upper(),
        "start_time": "2026-01-01T02:00:00Z",
        "total_run_time": seconds,
        "estimated_run_time": seconds,
    }


class Server:
    """Prefect's API for one flow run, whose states and task runs change with each poll."""

    prefect_ui = "http://127.0.0.1:4200"
    state_dir = Path(".nightshift")

    def __init__(self, polls: Polls, active: list[dict[str, Any]] | None = None) -> None:
        self.polls, self.active = iter(polls), active or []
        self.started: list[Any] = []
        self.state, self.tasks = polls[0]
        self.progress: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        words = {"name": "quick-fox", "state_name": self.state.title(), "state": {"message": "sft failed"}}
        return {"id": "r1", "state_type": self.state, **words}

    def prefect(self, method: str, path: str, body: Any = None) -> Any:
        match path:
            case "/flow_runs/filter":
                return self.active
            case "/deployments/name/finetune/here" | "/deployments/name/finetune/prod":
                return {"id": "d1"}
            case "/deployments/d1/create_flow_run":
                self.started.append(body)
                return self.run()
            case "/flow_runs/r1":
                self.state, self.tasks = next(self.polls)
                if self.state == "AWAY":
                    raise UnreachableError("GET: connection refused")
                if self.state == "UNKNOWN":
                    raise StageError("GET: HTTP Error 422")
                if self.state == "INTERRUPT":
                    raise KeyboardInterrupt
                return self.run()
            case "/task_runs/filter":
                return self.tasks
            case "/artifacts/filter":
                return self.progress
        raise AssertionError(path)


@pytest.fixture(autouse=True)
def _at_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.0)


@pytest.fixture
def summaries(in_tmp: Path) -> None:
    write_json(in_tmp / "data/dedupe/summary.json", {"rows_in": 2100, "rows_out": 970})
    write_json(in_tmp / "data/sft/summary.json", {"steps": 117, "tokens": 90218})


def follow(polls: Polls, *, terminal: bool = False, **more: Any) -> tuple[str, Server, str]:
    """Return what was shown, the server, and how the run ended."""
    server, out = Server(polls, more.pop("active", None)), StringIO()
    server.progress = more.pop("progress", [])
    console = Console(file=out, force_terminal=terminal, width=100 if terminal else 60)
    ending = run_deployment(more.pop("of", "finetune/here"), more.pop("overrides", {}), server, console)  # type: ignore[arg-type]
    return out.getvalue(), server, ending


RUNNING: Polls = [
    ("SCHEDULED", []),
    ("RUNNING", [task("dedupe", "Running")]),
    ("RUNNING", [task("dedupe", "Completed", 1.24), task("split", "Skipped", 0.01, "COMPLETED")]),
    ("RUNNING", [task("dedupe", "Completed", 1.24), task("sft", "Running", 64)]),
    ("COMPLETED", [task("dedupe", "Completed", 1.24), task("sft", "Completed", 480)]),
]


@pytest.mark.usefixtures("summaries")
def test_a_pipe_gets_a_line_when_a_stage_starts_and_one_when_it_has_ended() -> None:
    shown, server, ending = follow(RUNNING)
    assert shown.splitlines() == [
        "started a run of finetune/here: http://127.0.0.1:4200/runs/flow-run/r1",
        "dedupe        started",
        "dedupe        completed      1.2 s  2,100 → 970 rows",
        "split         skipped        0.0 s",
        "sft           started",
        "sft           completed       8:00  117 steps, 90,218 tokens",
    ]
    assert server.started == [{}]
    assert ending == "Completed: sft failed"


@pytest.mark.usefixtures("summaries")
def test_a_pipe_gets_a_line_about_a_long_stage_every_five_minutes() -> None:
    polls: Polls = [("RUNNING", [task("sft", "Running", seconds)]) for seconds in (0, 1, 299, 301, 500, 602)]
    step = {"key": "sft-progress", "data": 42.0, "description": "step 49/117 loss 1.04"}
    shown, _, _ = follow([("SCHEDULED", []), *polls, RUNNING[-1]], progress=[step])
    assert shown.splitlines()[1:-2] == [
        "sft           started",
        "sft           running         5:01  step 49/117 loss 1.04",
        "sft           running        10:02  step 49/117 loss 1.04",
    ]


@pytest.mark.usefixtures("summaries")
def test_a_terminal_shows_progress_below_the_finished_stages() -> None:
    step = {"key": "sft-progress", "data": 42.0, "description": "step 49/117 loss 1.04"}
    shown, _, _ = follow(RUNNING, terminal=True, progress=[step])
    assert "dedupe        completed      1.2 s  2,100 → 970 rows" in shown
    assert "step 49/117 loss 1.04" in shown
    assert "started\n" not in shown


def test_splitting_and_scoring_are_described_by_what_they_count(in_tmp: Path) -> None:
    sides = {"test": 100, "train": 826, "validation": 44}
    write_json(in_tmp / "data/split/summary.json", {"rows_in": 970, "rows_out_by_side": sides})
    write_json(in_tmp / "data/evaluate/summary.json", {"rows_in": 908, "rows_out": 908})
    assert watch.result_of("split", in_tmp) == "826 train, 44 validation, 100 test"
    assert watch.result_of("evaluate", in_tmp) == "908 answers and losses scored"


def test_an_active_run_is_joined_and_takes_no_overrides() -> None:
    active = [{"id": "r1", "name": "quick-fox", "auto_scheduled": False}]
    shown, server, _ = follow([("RUNNING", []), ("COMPLETED", [])], active=active)
    assert shown.startswith("joined a run of finetune/here: ")
    assert server.started == []
    with pytest.raises(StageError, match="run quick-fox is active; wait for it or cancel it"):
        follow([("RUNNING", [])], active=active, overrides={"sft.seed": 7})


def test_a_run_that_is_planned_for_later_is_not_joined() -> None:
    planned = {"id": "r0", "name": "later", "auto_scheduled": True}
    assert find_active(Server([("RUNNING", [])], [planned]), "finetune/prod") is None  # type: ignore[arg-type]


def test_overrides_are_passed_to_the_flow() -> None:
    _, server, _ = follow([("RUNNING", []), ("COMPLETED", [])], overrides={"sft.seed": 7})
    assert server.started == [{"parameters": {"overrides": {"sft.seed": 7}}}]


@pytest.mark.parametrize("text", ["sft.seed=7", "[1]", "7", "{"])
def test_overrides_that_are_no_json_object_are_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--overrides: .*write it as '\{\"sft\.seed\": 7\}'"):
        parse_overrides(text)


def test_an_outage_of_the_server_is_reported_once_and_outlasted(in_tmp: Path) -> None:
    # The record of a process that was killed stays.
    write_json(in_tmp / ".nightshift" / "stack.json", {"prefect": {"pid": 1, "boot_id": "b", "port": 4200}})
    shown, _, _ = follow([("RUNNING", []), ("AWAY", []), ("AWAY", []), ("RUNNING", []), ("COMPLETED", [])])
    assert shown.count("Prefect does not respond; the run continues") == 1


def test_a_rejected_request_is_no_outage() -> None:
    with pytest.raises(StageError, match="HTTP Error 422"):
        follow([("RUNNING", []), ("UNKNOWN", [])])


def test_servers_that_were_stopped_are_not_waited_for(in_tmp: Path) -> None:
    with pytest.raises(StageError, match="the servers were stopped; `make run` starts them again"):
        follow([("RUNNING", []), ("AWAY", [])])


def test_a_failed_run_is_an_error_with_its_reason() -> None:
    with pytest.raises(StageError, match="run quick-fox Failed: sft failed; its log is at http://127"):
        follow([("RUNNING", []), ("FAILED", [task("sft", "Failed", 3)])])


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_leaves_the_run_alone(terminal: bool) -> None:  # noqa: FBT001
    with pytest.raises(StageError, match="no longer watched, but the run continues: `make run` joins it"):
        follow([("RUNNING", []), ("RUNNING", [task("sft", "Running")]), ("INTERRUPT", [])], terminal=terminal)


def test_files_that_are_not_here_leave_the_figures_empty() -> None:
    shown, _, _ = follow([("RUNNING", []), ("COMPLETED", [task("gate", "Completed", 2)])])
    assert shown.splitlines()[1:] == ["gate          completed      2.0 s"]


def test_the_figures_of_a_run_are_those_of_its_workspace(in_tmp: Path) -> None:
    write_json(in_tmp / "data/dedupe/summary.json", {"rows_in": 2100, "rows_out": 970})
    completed = "dedupe        completed      1.2 s"
    assert completed in follow(RUNNING, of="finetune/prod")[0].splitlines()
    folder = in_tmp / ".nightshift/workspaces/2026-01-31-r1"
    write_json(folder / "data/dedupe/summary.json", {"rows_in": 5, "rows_out": 4})
    assert f"{completed}  5 → 4 rows" in follow(RUNNING, of="finetune/prod")[0].splitlines()
