"""What no later run needs is removed, and nothing else."""

import os
import time
from pathlib import Path

import pytest

from nightshift.pipeline import prune
from nightshift.pipeline.leases import lease

HOME = Path(".nightshift")


def make(name: str, days: float) -> Path:
    """Create a folder with a file, which last changed some days ago."""
    folder = HOME / name
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    moment = time.time() - days * 86_400
    for path in (folder / "file", folder):
        os.utime(path, (moment, moment))
    return folder


@pytest.mark.usefixtures("in_tmp")
def test_workspaces_of_failed_runs_are_removed_after_a_week_unless_a_run_is_active() -> None:
    old, active, young = (
        make(f"workspaces/2026-01-31-0000000{number}", days) for number, days in enumerate((8, 8, 6))
    )
    with lease("00000001-x"):
        prune.prune()
    assert [folder.exists() for folder in (old, active, young)] == [False, True, True]


@pytest.mark.usefixtures("in_tmp")
def test_the_checkpoints_of_the_newest_trainings_and_of_active_ones_are_kept() -> None:
    trainings = [make(f"checkpoints/{number}", number) for number in range(8)]
    prune.prune()
    assert [folder.exists() for folder in trainings] == [True] * 5 + [False] * 3
    several = [make(f"checkpoints/active-{number}", 0.01 * number) for number in range(9)]
    prune.prune()
    assert all(folder.exists() for folder in several)


@pytest.mark.usefixtures("in_tmp")
def test_old_rebuilds_and_scores_are_removed_and_everything_else_stays() -> None:
    gone = [make("reproduce/m-1", 8), make("memo/scores/a", 91)]
    kept = [make("reproduce/m-2", 6), make("memo/scores/b", 89)]
    kept += [make(name, 1000) for name in ("bases/b", "mlflow-artifacts/1", "tracking", "memo/x", "prefect")]
    prune.prune()
    assert [folder.exists() for folder in gone] == [False, False]
    assert [folder.exists() for folder in kept] == [True] * len(kept)


@pytest.mark.usefixtures("in_tmp")
def test_caches_to_which_nothing_was_added_for_long_are_removed_but_for_replies() -> None:
    folder, moment = HOME / "memo", time.time() - 91 * 86_400
    folder.mkdir(parents=True)
    for name in ("tokens", "signatures", "replies"):
        for path in (folder / f"{name}.sqlite", folder / f"{name}.sqlite-wal"):
            path.touch()
            os.utime(path, (moment, moment))
    # What was added last is still in SQLite's log.
    (folder / "signatures.sqlite-wal").touch()
    prune.prune()
    kept = {"signatures.sqlite", "signatures.sqlite-wal", "replies.sqlite", "replies.sqlite-wal"}
    assert {path.name for path in folder.iterdir()} == kept


def test_a_long_log_goes_on_in_the_same_file(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "LOG_MIB", 1 / 2**20)
    path = in_tmp / HOME / "logs" / "prefect.log"
    path.parent.mkdir(parents=True)
    with path.open("ab", buffering=0) as service:
        service.write(b"before")
        prune.prune()
        service.write(b"!")
    assert path.read_bytes() == b"!"
    assert path.with_suffix(".log.1").read_bytes() == b"before"


def test_what_cannot_be_removed_stays(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, other = make("reproduce/m-1", 8), make("reproduce/m-2", 8)

    def fail(path: Path) -> None:
        if path.name == "m-1":
            raise PermissionError(1, "not permitted")
        real(path)

    real = prune.shutil.rmtree
    monkeypatch.setattr(prune.shutil, "rmtree", fail)
    prune.prune()
    assert (folder.exists(), other.exists()) == (True, False)
    assert "m-1 stays: " in caplog.text
    assert in_tmp.exists()
