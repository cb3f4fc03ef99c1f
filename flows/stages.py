"""Run one program of the pipeline as a Prefect task: its output goes to the run's log, line by line.

Stages go through `dvc repro --single-item`, so that the flow and `dvc repro` by hand share one lock
file and one cache; Prefect's own cache is off.
"""

import contextvars
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, cast

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks import supervise
from tasks.errors import StageError, TrainingError
from tasks.state import tools_environment

if TYPE_CHECKING:
    from uuid import UUID

STEP = re.compile(r"\bstep (\d+)/(\d+)\b")
EXITED = re.compile(r"exited with (\d+)$")
# Each attempt at a training halves the micro-batch, leaves rows out, or goes on; the stage ends the row.
RETRIES = 8
# A training finishes its step and saves when it is asked to end.
GRACE_SECONDS = 60.0
BIN = Path(sys.executable).parent
Step = tuple[float, str]  # percent, figures
PROGRESS_THREAD = "progress"


def may_get_further(_task: object, _run: object, state: State[None]) -> bool:
    """Tell whether another attempt makes sense: the kinds of `TrainingError`, and nothing else."""
    error = state.result(raise_on_failure=False)
    return getattr(error, "exit_code", None) in TrainingError.EXIT_CODES.values()


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_condition_fn=may_get_further,
)
def run_stage(stage: str, run_id: str, *, may_run: bool = True, force: bool = False) -> State[None]:
    """Bring one stage up to date.

    Args:
        stage: Name in dvc.yaml.
        run_id: The MLflow run to which a training logs.
        may_run: DVC found a change in it or above it; without one it is not even asked again.
        force: Run it whatever DVC knows, as what looks outside must.

    Returns:
        State `Completed` if it ran, `Cached` if DVC restored it, `Skipped` if nothing changed.

    Raises:
        StageError: The stage failed; the message is its own last error.
    """
    if not may_run:
        return Completed(name="Skipped")
    options = ["--single-item", *(["--force"] if force else [])]
    lines = stream([str(BIN / "dvc"), "repro", *options, stage], stage, run_id)
    if any(line == f"Running stage '{stage}':" for line in lines):
        return Completed()
    cached = any("is cached - skipping run" in line for line in lines)
    return Completed(name="Cached" if cached else "Skipped")


@task(task_run_name="{module}", cache_policy=NO_CACHE, persist_result=False)
def run_program(module: str, run_id: str, arguments: tuple[str, ...] = ()) -> None:
    """Run `python -m tasks.<module>`: a side effect, so it is no DVC stage and always runs.

    Raises:
        StageError: The program failed; the message is its own last error.
    """
    stream([sys.executable, "-m", f"tasks.{module}", *arguments], module, run_id)


def stream(command: list[str], name: str, run_id: str) -> list[str]:
    """Run a command under the supervisor and pass its output on to the run's log.

    Returns:
        The output that says what DVC did and what went wrong.
    """
    kept: list[str] = []
    log = get_run_logger()
    with progress(name) as read_progress:

        def on_line(line: str) -> None:
            log.info(line)
            read_progress(line)
            if line.startswith(("Running stage", "Stage ", "error:", "ERROR:")):
                kept.append(line)

        code = supervise.run(command, on_line=on_line, env=environment(run_id), grace_seconds=GRACE_SECONDS)
    if code:
        reason = next((line for line in kept if line.startswith("error:")), kept[-1:] or "no output")
        error = StageError(f"{name} failed with exit code {code}: {reason}")
        # DVC has one exit code for all failures; the stage's own stands in what it says.
        error.exit_code = next((int(found[1]) for line in kept if (found := EXITED.search(line))), code)
        raise error
    return kept


def environment(run_id: str) -> dict[str, str]:
    """Build what a program needs beyond the flow's own environment."""
    return {**tools_environment(), "MLFLOW_RUN_ID": run_id}


@contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Keep a progress artefact in Prefect, from `step 3/10` lines, for as long as the block runs.

    A thread of its own sends the newest figures: a server that is slow or away costs them, and neither stops
    nor slows what computes.

    Yields:
        A reader of the output's lines.
    """
    steps: SimpleQueue[Step | None] = SimpleQueue()
    ended = threading.Event()

    def read(line: str) -> None:
        if found := STEP.search(line):
            steps.put((100 * int(found[1]) / int(found[2]), line[found.start() :]))

    context = contextvars.copy_context()  # in which Prefect finds the run that the artefact belongs to
    arguments = (send_progress, name, steps, ended)
    threading.Thread(target=context.run, args=arguments, name=PROGRESS_THREAD, daemon=True).start()
    try:
        yield read
    finally:
        ended.set()
        steps.put(None)


def send_progress(name: str, steps: SimpleQueue[Step | None], ended: threading.Event) -> None:
    """Send the newest step to Prefect, again and again until None comes.

    Args:
        name: Of the stage.
        steps: Its progress.
        ended: The stage has: a failure is nobody's concern, and Prefect's client may be closed.
    """
    artifact: UUID | None = None
    while step := newest(steps):
        percent, figures = step
        try:
            if artifact is None:
                created = create_progress_artifact(percent, key=f"{name}-progress", description=figures)
                artifact = cast("UUID", created)
            else:
                update_progress_artifact(artifact, progress=percent, description=figures)
        except Exception as err:  # noqa: BLE001 - what reports may not end what computes
            if not ended.is_set():
                get_run_logger().warning("%s: its progress is not shown: %s", name, err)
            return


def newest(steps: SimpleQueue[Step | None]) -> Step | None:
    """Wait for a step, and return the newest; None at the end."""
    latest = steps.get()
    while latest and not steps.empty():
        following = steps.get()
        if following is None:
            steps.put(None)
            break
        latest = following
    return latest
