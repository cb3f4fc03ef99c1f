"""What a run does with its workspace: publish its results on a branch, and remove it if it completed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import get_run_logger

from flows.stages import BIN, run_command
from nightshift.core.config import load_params
from nightshift.core.errors import StageError
from nightshift.pipeline import workspaces
from nightshift.pipeline.prune import KEPT_DAYS
from nightshift.registry.freshness import NightlyParams
from nightshift.tracking.runs import git_commit


@contextmanager
def published_results() -> Iterator[Callable[[str], None]]:
    """Publish the results when the block ends, also if it fails, and whenever it calls the yielded function.

    In a checkout, nothing is published: its files are the results.
    """
    log = get_run_logger()
    if workspaces.is_workspace():
        edits = workspaces.edited_files()
        added = f", with the uncommitted edits of {', '.join(edits)}" if edits else ""
        log.info("%s: a clone of %s at commit %s%s", Path.cwd(), workspaces.checkout(), git_commit(), added)
        for note in workspaces.read_notes():
            log.warning(note)

    def publish(what: str) -> None:
        if branch := workspaces.publish(f"{Path.cwd().name}: {what}"):
            log.info("the results so far are on the branch %s", branch)

    try:
        yield publish
    except BaseException:
        # What arrived, and what was computed, must not be lost with the night.
        publish("failed")
        if workspaces.is_workspace():
            log.info("%s is kept for %d days", Path.cwd(), KEPT_DAYS)
        raise
    publish("ended")


def push_results() -> None:
    """Push the files and the branch of the run, if `nightly.push` is set; an error is only logged."""
    remote = load_params(NightlyParams, "nightly").push
    if remote is None or not workspaces.is_workspace():
        return
    log = get_run_logger()
    try:
        run_command([str(BIN / "dvc"), "push", "--run-cache"], "dvc push", None)
        workspaces.push(remote)
    except StageError as err:
        log.warning("the results are not pushed: %s; the next run pushes what is new then", err)


def remove_workspace(flow: object, flow_run: object, state: object) -> None:  # noqa: ARG001 - a hook's names
    """Remove the workspace of a completed run; a hook of the flow."""
    workspaces.remove()
