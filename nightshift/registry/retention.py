"""Remove the branches of old runs, from DVC's cache what nothing needs any more, and MLflow's deleted runs.

Each night leaves a copy of every changed output in DVC's cache. What stays:

- all outputs in the dvc.lock of the newest `nightly.keep_runs` branches of runs, of the checkout, of its
  workspaces, and of every commit that another branch, tag or remote branch reaches;
- of each registered version, the outputs of the snapshot: from them, `nightshift reproduce` computes all
  others again.

A remote is never changed. Runs that a user deleted in MLflow are removed with their files after
`DELETED_DAYS`, unless a version was registered from them.
"""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow.entities import ViewType

from nightshift.core.config import load_params
from nightshift.core.errors import StageError
from nightshift.core.state import ARTIFACTS, DATABASE, WORKSPACES, state_dir
from nightshift.pipeline.dvc_cache import listing, locked_repo
from nightshift.pipeline.graph import LOCK, locked_outputs, parse_outputs
from nightshift.pipeline.leases import lease_holder, leased_runs
from nightshift.pipeline.workspaces import git, run_branches
from nightshift.registry.freshness import NightlyParams
from nightshift.registry.lineage import open_lineage
from nightshift.registry.versions import open_registry, registered

# An object that is newer may belong to a run that has not written its dvc.lock yet.
YOUNG_DAYS = 2
# A deleted run of MLflow can be restored this long.
DELETED_DAYS = 30
log = logging.getLogger(__name__)


def drop_old_runs() -> None:
    """Remove what is old from the repository and from DVC's cache in the current folder, a checkout.

    Nothing is removed while a run is active, or from a cache outside the checkout: other projects may use it.

    Raises:
        GateError: A registered version has no lineage, so it is not known what it needs.
        StageError: DVC is running in this checkout.
    """
    keep = load_params(NightlyParams, "nightly").keep_runs
    branches = run_branches(Path())
    is_active = any(lease_holder(run) != "dead" for run in leased_runs())
    if keep is None or len(branches) <= keep or is_active:
        return
    newest, old = branches[:keep], branches[keep:]
    client, name = open_registry()
    versions = registered(client, name)
    runs = {version.tags.get("nightshift.flow_run", "")[:8] for version in versions}
    # The commit of a version may be on its branch only.
    dropped = [branch for branch in old if branch[-8:] not in runs]
    if not dropped:
        return
    needed: set[str] = set()
    for outputs in (*of_files(), *of_commits(newest, old)):
        needed.update(oid for stage in outputs.values() for oid in stage.values())
    for version in versions:
        with open_lineage(name, int(version.version), LOCK.name) as file:
            needed.update(locked_outputs(file).get("snapshot", {}).values())
    for branch in dropped:
        git("update-ref", "-d", branch)
    freed = remove_objects(needed)
    log.info(
        "%d branches of old runs were removed, and %d MiB that only they needed", len(dropped), freed >> 20
    )


def of_files() -> Iterator[Mapping[str, Mapping[str, str]]]:
    """Yield the outputs in the dvc.lock of the checkout and of its workspaces."""
    yield locked_outputs()
    yield from map(locked_outputs, (state_dir() / WORKSPACES).glob(f"*/{LOCK}"))


def of_commits(newest: list[str], old: list[str]) -> Iterator[Mapping[str, Mapping[str, str]]]:
    """Yield the outputs in every dvc.lock of the newest branches of runs, and of all other refs."""
    excluded = [f"--exclude={branch}" for branch in (*newest, *old)]
    commits = git("rev-list", *excluded, "--all", "--remove-empty", "--", LOCK.name).splitlines()
    for commit in {*newest, *commits}:
        # The commit may be the one that removed the file.
        if git("ls-tree", "--name-only", commit, LOCK.name):
            yield parse_outputs(git("show", f"{commit}:{LOCK.name}"))


def remove_objects(needed: set[str]) -> int:
    """Remove the objects from DVC's cache that are not needed and not young; return their size in bytes."""
    freed = 0
    with locked_repo() as repo:
        cache = repo.cache.local
        folder = Path(cache.path)
        if not folder.is_relative_to(repo.root_dir):
            log.info("%s is outside the checkout, and keeps all that is in it", folder)
            return 0
        kept = needed.union(*(listing(Path(cache.oid_to_path(oid))) for oid in needed))
        for path in folder.glob("*/*"):
            stat = path.stat()
            if path.parent.name + path.name not in kept and time.time() - stat.st_mtime > YOUNG_DAYS * 86_400:
                path.unlink()
                freed += stat.st_size
    return freed


def drop_deleted_runs() -> None:
    """Remove the runs that were deleted in MLflow long ago, with their files, from the database of the stack.

    Raises:
        StageError: `mlflow gc` failed.
    """
    database = state_dir() / DATABASE
    if not database.is_file():
        return
    client, name = open_registry()
    experiments = [one.experiment_id for one in client.search_experiments(view_type=ViewType.ALL)]
    deleted = {
        one.info.run_id for one in client.search_runs(experiments, run_view_type=ViewType.DELETED_ONLY)
    }
    if not deleted:
        return
    if needed := sorted({version.run_id for version in registered(client, name)} & deleted):
        log.warning(
            "MLflow's deleted runs stay, since versions were registered from some: %s", ", ".join(needed)
        )
        return
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(state_dir() / ARTIFACTS), "--older-than", f"{DELETED_DAYS}d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"mlflow gc: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
