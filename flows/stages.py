"""Run one program of the pipeline as a Prefect task, and forward its output to the run's log.

Stages run through `dvc repro --single-item`, so the flow and a manual `dvc repro` share one lock file
and one cache; Prefect's own cache is off.
"""

import contextvars
import fcntl
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from nightshift.core.errors import StageError, TrainingError
from nightshift.core.files import read_json
from nightshift.core.stage import RESULT
from nightshift.core.state import state_dir, tools_environment
from nightshift.pipeline import supervise
from nightshift.pipeline.dvc_cache import mend
from nightshift.pipeline.graph import outputs, read_stages

if TYPE_CHECKING:
    from uuid import UUID

STEP = re.compile(r"\bstep (\d+)/(\d+)\b")
# Each retry of a training halves the micro-batch, skips rows or resumes; the stage ends the retries.
RETRIES = 8
# On SIGTERM, training finishes its step and saves a checkpoint.
GRACE_SECONDS = 60.0
BIN = Path(sys.executable).parent
Step = tuple[float, str]  # percent, description
PROGRESS_THREAD = "progress"


def is_retryable(_task: object, _run: object, state: State[None]) -> bool:
    """Return whether a retry makes sense: only for the kinds of `TrainingError`."""
    error = state.result(raise_on_failure=False)
    return getattr(error, "exit_code", None) in TrainingError.EXIT_CODES.values()


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_condition_fn=is_retryable,
)
def run_stage(stage: str, run_id: str | None, *, may_run: bool = True, force: bool = False) -> State[None]:
    """Bring one stage up to date.

    Args:
        stage: Name in dvc.yaml.
        run_id: MLflow run that training logs to, or None.
        may_run: Whether DVC found a change in the stage or upstream; if not, it is skipped.
        force: Whether to run it even if DVC has its result, for stages that read external sources.

    Returns:
        State `Completed` if it ran, `Cached` if DVC had its result, `Skipped` if nothing changed.

    Raises:
        StageError: The stage failed; the message is its own last error.
    """
    if not may_run:
        return Completed(name="Skipped")
    options = ["--single-item", *(["--force"] if force else [])]
    with stage_lock(stage):
        command = [str(BIN / "dvc"), "repro", *options, stage]
        did_run = run_command(command, stage, run_id)
        if not did_run and (damaged := mend(Path(), [stage])):
            get_run_logger().warning("%s; restoring %s again", "; ".join(damaged), stage)
            remove_outputs(stage)
            did_run = run_command(command, stage, run_id)
    return Completed() if did_run else Completed(name="Cached")


def remove_outputs(stage: str) -> None:
    """Remove the outputs of a stage from the folder, not from DVC's cache."""
    for path in map(Path, outputs(read_stages()[stage])):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Let one run at a time compute a stage; the next one may find the result in DVC's cache."""
    file = state_dir() / "locks" / stage
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@task(task_run_name="{module}", cache_policy=NO_CACHE, persist_result=False)
def run_program(module: str, run_id: str | None, arguments: tuple[str, ...] = ()) -> None:
    """Run `python -m tasks.<module>`, which has side effects: it is not a DVC stage and always runs.

    Raises:
        StageError: The program failed; the message is its own last error.
    """
    run_command([sys.executable, "-m", f"tasks.{module}", *arguments], module, run_id)


def run_command(command: list[str], name: str, run_id: str | None) -> bool:
    """Run a program under the supervisor, directly or through DVC; forward its output to the run's log.

    Returns:
        Whether the program ran, which DVC may find unnecessary.

    Raises:
        StageError: It failed. The exit code is its own if reported; DVC uses one for all failures.
    """
    log, last = get_run_logger(), "no output"
    with TemporaryDirectory() as folder, progress(name) as read_progress:
        result_file = Path(folder) / "result.json"

        def on_line(line: str) -> None:
            nonlocal last
            log.info(line)
            read_progress(line)
            last = line

        env = {**environment(run_id), RESULT: str(result_file)}
        code = supervise.run(command, on_line=on_line, env=env, grace_seconds=GRACE_SECONDS)
        result: dict[str, Any] | None = read_json(result_file) if result_file.is_file() else None
    if code:
        # A crashed or killed program leaves no result.
        failure: dict[str, Any] = result if result and result["code"] else {"code": code, "error": last}
        error = StageError(f"{name} failed with exit code {failure['code']}: {failure['error']}")
        error.exit_code = failure["code"]
        raise error
    return result is not None


def environment(run_id: str | None) -> dict[str, str]:
    """Return the variables that a program needs in addition to the flow's environment."""
    # Programs report progress in lines; bars would fill the log.
    return {**tools_environment(), "TQDM_DISABLE": "1"} | ({"MLFLOW_RUN_ID": run_id} if run_id else {})


@contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Maintain a Prefect progress artifact from `step 3/10` lines while the block runs.

    A separate thread sends the latest step: a slow or unreachable server loses updates, but never stops
    or slows the computation.

    Yields:
        A reader of the output's lines.
    """
    steps: SimpleQueue[Step | None] = SimpleQueue()
    ended = threading.Event()

    def read(line: str) -> None:
        if found := STEP.search(line):
            steps.put((100 * int(found[1]) / int(found[2]), line[found.start() :]))

    context = contextvars.copy_context()  # with the Prefect run of the artifact
    arguments = (send_progress, name, steps, ended)
    threading.Thread(target=context.run, args=arguments, name=PROGRESS_THREAD, daemon=True).start()
    try:
        yield read
    finally:
        ended.set()
        steps.put(None)


def send_progress(name: str, steps: SimpleQueue[Step | None], ended: threading.Event) -> None:
    """Send the latest step to Prefect repeatedly until None arrives.

    Args:
        name: Stage name.
        steps: Queue of the stage's steps.
        ended: Set at the end of the stage; Prefect's client may be closed, so errors are ignored.
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
        except Exception as err:  # noqa: BLE001 - reporting must not stop the computation
            if not ended.is_set():
                get_run_logger().warning("%s: progress is not shown: %s", name, err)
            return


def newest(steps: SimpleQueue[Step | None]) -> Step | None:
    """Wait for a step, and return the latest one; None at the end."""
    latest = steps.get()
    while latest and not steps.empty():
        following = steps.get()
        if following is None:
            steps.put(None)
            break
        latest = following
    return latest
