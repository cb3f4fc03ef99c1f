"""Workspaces: clones in which the runs of deployments work, so that a run and the user's edits never meet.

`python -m nightshift.pipeline.workspaces FLOW_RUN` makes one of the checkout in the current folder, and
prints its path. It is pinned to a commit, shares DVC's cache and the state folder, and has its own
params.yaml, dvc.lock and data. Its results go to the branch `runs/<date>-<id>` of the checkout, from which
the next run continues.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from nightshift.core import paths
from nightshift.core.errors import StageError
from nightshift.core.files import read_json, write_json, write_text
from nightshift.core.paths import DATA, GATE, METRICS, RAW
from nightshift.core.stage import run_main
from nightshift.core.state import ORIGIN, WORKSPACES, state_dir
from nightshift.pipeline.dvc_cache import mend, record
from nightshift.pipeline.graph import LOCK, locked_outputs, read_stages
from nightshift.pipeline.prune import prune
from nightshift.raw.formats import shard_suffix
from nightshift.raw.shards import find_shards

BRANCHES = "refs/heads/runs"
# In a workspace: what its run should log first.
NOTES = Path(".git", "nightshift-notes")
# Subject of the commit of the edits that were not committed when a run started.
EDITS = "Uncommitted edits of the checkout at the start of a run"
EMAIL = "nightshift@localhost"
AUTHOR = ("-c", "user.name=nightshift", "-c", f"user.email={EMAIL}", "-c", "commit.gpgsign=false")
log = logging.getLogger(__name__)


def main(flow_run: str) -> None:
    """Make a workspace of the checkout in the current folder, and print its path."""
    prune()
    folder = workspaces() / f"{date.today():%Y-%m-%d}-{flow_run[:8]}"
    # A run that Prefect starts again begins anew.
    shutil.rmtree(folder, ignore_errors=True)
    create(folder)
    sys.stdout.write(f"{folder}\n")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("flow_run", help="id of the flow run")


def workspaces() -> Path:
    """Return the folder of all workspaces."""
    return state_dir() / WORKSPACES


def is_workspace() -> bool:
    """Return whether the current folder is a workspace."""
    return Path.cwd().parent == workspaces()


def checkout() -> Path:
    """Return the checkout that the current folder is a workspace of, or the current folder itself."""
    return Path(ORIGIN.read_text(encoding="utf-8")) if is_workspace() else Path.cwd()


def create(folder: Path) -> None:
    """Make a workspace of the checkout in the current folder.

    Raises:
        StageError: The checkout is no git repository with a commit.
    """
    clone(folder, commit_edits())
    share_dvc(folder)
    link_data(folder)
    if lock := newest_lock(Path.cwd()):
        write_text(folder / LOCK, lock)
        write_text(folder / NOTES, "\n".join(mend(folder)))
        restore_outputs(folder)
        add_shards(folder / RAW, raw_listing(folder), raw_listing(Path()))


def read_notes() -> list[str]:
    """Return what the making of this workspace found in DVC's cache."""
    return NOTES.read_text(encoding="utf-8").splitlines() if NOTES.is_file() else []


def commit_edits() -> str:
    """Return HEAD, or a commit on top of it with the uncommitted edits of tracked files.

    Neither the index nor a branch changes: the commit becomes part of the branch of the run.

    Raises:
        StageError: The current folder is no git repository with a commit.
    """
    try:
        head = git("rev-parse", "--verify", "HEAD")
    except StageError as err:
        raise StageError(
            f"{Path.cwd()}: a run of a deployment works in a clone, which needs a git repository with a "
            f"commit; run `git init` and `git commit`, or use `nightshift run` ({err})"
        ) from err
    with tempfile.TemporaryDirectory() as temporary:
        index, copy = Path(git("rev-parse", "--git-path", "index")), Path(temporary) / "index"
        if index.is_file():
            shutil.copyfile(index, copy)
        git("add", "--update", ":/", index=copy)
        tree = git("write-tree", index=copy)
    if tree == git("rev-parse", "HEAD^{tree}"):
        return head
    return git(*AUTHOR, "commit-tree", tree, "-p", head, "-m", EDITS)


def edited_files() -> list[str]:
    """Return the files whose uncommitted edits are part of the workspace's commit."""
    if git("log", "-1", "--format=%s") != EDITS:
        return []
    return git("diff", "--name-only", "HEAD^", "HEAD").splitlines()


def clone(folder: Path, commit: str) -> None:
    """Clone the repository in the current folder at a commit.

    Raises:
        StageError: The commit does not exist.
    """
    git("clone", "--quiet", "--no-checkout", str(Path.cwd()), str(folder))
    git("checkout", "--quiet", "--detach", commit, folder=folder)
    write_text(folder / ORIGIN, str(Path.cwd()))


def share_dvc(folder: Path) -> None:
    """Give the workspace this checkout's DVC cache and settings: remotes, also of .dvc/config.local."""
    from dvc.config import Config, merge  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]

    with Repo() as repo, Config(str(folder / ".dvc")).edit("local") as local:
        # Relative paths are resolved here; in the clone they would be other folders.
        merge(local, repo.config.read())
        local["cache"]["dir"] = repo.cache.local_cache_dir


def link_data(folder: Path) -> None:
    """Link what git does not know, such as a folder of own data, which params.yaml may name.

    Left out are hidden files, code (the commit would not record it), and what the stages and DVC write.
    """
    known = [path for path in vars(paths).values() if isinstance(path, Path) and len(path.parts) > 1]
    written = {DATA / name for name in {path.parts[1] for path in known} | set(read_stages())}
    listed = [Path(name) for name in git("ls-files", "--others", "--directory", "-z").split("\0") if name]
    if DATA in listed:
        listed += DATA.iterdir()
    for path in listed:
        is_hidden = any(part.startswith((".", "__pycache__")) for part in path.parts)
        is_written = path in (DATA, LOCK) or not written.isdisjoint((path, *path.parents))
        if not (is_hidden or is_written or path.suffix == ".py"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(path.absolute())


def run_branches(repository: Path) -> list[str]:
    """Return the branches that runs have committed, newest first, and none of the user with such a name."""
    wanted = ("--sort=-committerdate", "--format=%(committeremail) %(refname)", BRANCHES)
    found = git("for-each-ref", *wanted, folder=repository).splitlines()
    return [line.removeprefix(f"<{EMAIL}> ") for line in found if line.startswith(f"<{EMAIL}> ")]


def newest_branch(repository: Path) -> str:
    """Return the newest branch of a run; empty if there is none, or no git repository."""
    if not (repository / ".git").exists():
        return ""
    found = git("for-each-ref", "--sort=-committerdate", "--format=%(refname)", BRANCHES, folder=repository)
    # The user may have a branch of that name, too.
    listing = ("ls-tree", "--name-only")
    return next((one for one in found.splitlines() if git(*listing, one, LOCK.name, folder=repository)), "")


def newest_lock(repository: Path) -> str | None:
    """Return the dvc.lock of the newest branch of a run, or else of the checkout; None without one."""
    if branch := newest_branch(repository):
        return git("show", f"{branch}:{LOCK}", folder=repository) + "\n"
    file = repository / LOCK
    return file.read_text(encoding="utf-8") if file.is_file() else None


def restore_outputs(folder: Path, *, force: bool = True) -> None:
    """Fetch the outputs in the workspace's dvc.lock from DVC's cache; what the cache lacks is left out.

    A stage whose outputs are missing runs again; the snapshot fetches its own from the remote, or fails.

    Args:
        folder: Folder of the workspace.
        force: Whether files that DVC does not know are replaced, or are an error.
    """
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        # DVC removes an output of which it finds only a part.
        repo.checkout(force=force, allow_missing=True)


def raw_listing(folder: Path) -> dict[str, str]:
    """Return name -> MD5 of the files of data/raw in a folder's dvc.lock; empty if it lists none."""
    from dvc.repo import Repo

    recorded = locked_outputs(folder / LOCK).get("snapshot", {}).get(RAW.as_posix())
    if recorded is None:
        return {}
    with Repo() as repo:
        file = Path(repo.cache.local.oid_to_path(recorded))
    return {entry["relpath"]: entry["md5"] for entry in read_json(file)} if file.is_file() else {}


def add_shards(raw: Path, known: dict[str, str], other: dict[str, str]) -> None:
    """Add the shards that only another snapshot has, as the newest ones, so that neither loses any.

    Args:
        raw: Folder of the shards; without it, nothing is added.
        known: Listing of its files, from `raw_listing`.
        other: Listing of the other snapshot's files.
    """
    from dvc.repo import Repo

    shards = {name: md5 for name, md5 in other.items() if shard_suffix(name) and "/" in name}
    missing = {name: md5 for name, md5 in sorted(shards.items()) if md5 not in known.values()}
    if not (missing and raw.is_dir()):
        return
    last = max((arrival for arrival, _ in find_shards(raw)), default=0)
    with Repo() as repo:
        for arrival, (name, md5) in enumerate(missing.items(), start=last + 1):
            target = raw / Path(name).parent / f"{arrival:06d}{shard_suffix(name)}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(repo.cache.local.oid_to_path(md5), target)
            log.info("%s: added, from %s of another snapshot", target, name)


def publish(message: str) -> str | None:
    """Commit dvc.lock, params.yaml and metrics.json to the branch of the run in the checkout's repository.

    The branch has one commit, on top of the one that the run works on; publishing again replaces it.

    Returns:
        Name of the branch; None if the current folder is no workspace, or dvc.lock says nothing new.
    """
    if not is_workspace() or not LOCK.is_file():
        return None
    here, branch = checkout(), f"{BRANCHES}/{Path.cwd().name}"
    if LOCK.read_text(encoding="utf-8") == newest_lock(here):
        return None
    commit_results(branch, message, newest_date(here))
    fetch = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
    git(*fetch, str(Path.cwd()), f"+{branch}:{branch}", folder=here)
    return branch.removeprefix("refs/heads/")


def newest_date(repository: Path) -> int:
    """Return the date of the newest branch of a run, in seconds since 1970; 0 if there is none."""
    branch = newest_branch(repository)
    return int(git("log", "-1", "--format=%ct", branch, folder=repository)) if branch else 0


def commit_results(branch: str, message: str, after: int) -> None:
    """Commit dvc.lock, params.yaml and metrics.json on top of HEAD to a branch, which starts anew.

    Args:
        branch: Full name of the branch.
        message: Message of the commit.
        after: Date of the branch before, in seconds since 1970; wherever the clock is, this one is newer.
    """
    found = {file.stem: read_json(file) for file in (METRICS, GATE) if file.is_file()}
    with tempfile.TemporaryDirectory() as temporary:
        index, metrics = Path(temporary) / "index", Path(temporary) / "metrics.json"
        write_json(metrics, found)
        git("read-tree", "HEAD", index=index)
        git("add", "--force", LOCK.name, "params.yaml", index=index)
        added = git("hash-object", "-w", str(metrics))
        git("update-index", "--add", "--cacheinfo", f"100644,{added},{metrics.name}", index=index)
        tree = git("write-tree", index=index)
    moment = max(int(time.time()), after + 1)
    commit = git(*AUTHOR, "commit-tree", tree, "-p", "HEAD", "-m", message, moment=moment)
    git("update-ref", branch, commit)


def push(remote: str) -> None:
    """Push the branch of the workspace from the checkout's repository to a remote of it, if it was published.

    Raises:
        StageError: Git cannot push.
    """
    branch = f"{BRANCHES}/{Path.cwd().name}"
    if git("for-each-ref", branch, folder=checkout()):
        git("push", "--quiet", remote, f"+{branch}", folder=checkout())


def take_over() -> None:
    """Bring dvc.lock and data of the checkout in the current folder to the newest run of a deployment.

    Shards that only the checkout has are kept.

    Raises:
        StageError: An output has edits that DVC does not know.
    """
    from dvc.exceptions import DvcException  # type: ignore[import-untyped]

    lock = newest_lock(Path.cwd())
    if lock is None or (LOCK.is_file() and LOCK.read_text(encoding="utf-8") == lock):
        return
    here = raw_listing(Path())
    before = LOCK.read_bytes() if LOCK.is_file() else None
    write_text(LOCK, lock)
    try:
        restore_outputs(Path(), force=False)
    except DvcException as err:
        LOCK.unlink() if before is None else LOCK.write_bytes(before)
        raise StageError(f"{Path.cwd()}: {err}; record them with `dvc commit`, or remove them") from err
    add_shards(RAW, raw_listing(Path()), here)
    record(RAW)


def remove() -> None:
    """Remove the workspace in the current folder, and enter its checkout; do nothing in a checkout."""
    if is_workspace():
        folder, here = Path.cwd(), checkout()
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)


def git(
    *arguments: str, folder: Path | None = None, index: Path | None = None, moment: int | None = None
) -> str:
    """Run git and return its output without the last line break.

    Args:
        arguments: Arguments.
        folder: Repository; None for the one in the current folder.
        index: Index file instead of the repository's own.
        moment: Date of a commit instead of now, in seconds since 1970.

    Raises:
        StageError: It failed.
    """
    environment = dict(os.environ)
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
    if moment:
        environment["GIT_COMMITTER_DATE"] = f"{moment} +0000"
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StageError(f"git {' '.join(arguments)} in {folder or Path.cwd()}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


if __name__ == "__main__":
    run_main(main, declare)
