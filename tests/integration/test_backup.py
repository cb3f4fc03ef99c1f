"""The champion is rebuilt from a clone and a backup alone, with the same digest."""

import json
import shutil
import subprocess
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest
from typer.testing import CliRunner

from infra.cli.app import app
from infra.local import backup
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import tree_digest
from nightshift.core.state import state_dir
from nightshift.pipeline.workspaces import git
from nightshift.registry import versions
from tests.helpers.champion import enter

USER = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")


@pytest.fixture(scope="module")
def saved(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Return the repository, the place of the backup, and the digest of the champion."""
    folder = shutil.copytree(registered, tmp_path_factory.mktemp("original") / "checkout")
    place = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        if not Path(".git").exists():
            git("init", "-q")
        git("add", "params.yaml")
        git(*USER, "commit", "-qm", "parameters")
        git("branch", "runs/2026-01-31-00000001")
        champion = versions.find_model("champion")
        assert versions.keep_base(champion.name, versions.read_reference(champion))
        assert CliRunner().invoke(app, ["backup", "--to", str(place)]).exit_code == 0
        return folder, place, champion.tags[versions.DIGEST]


@pytest.fixture
def clone(saved: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a new clone, which has nothing but the commit."""
    subprocess.run(["git", "clone", "-q", str(saved[0]), str(tmp_path / "clone")], check=True)
    enter(monkeypatch, tmp_path / "clone")
    return tmp_path / "clone"


def test_the_champion_is_restored_with_its_digest(
    saved: tuple[Path, Path, str], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, place, digest = saved
    hidden = original.rename(original.with_name("gone"))
    try:
        done = CliRunner().invoke(app, ["restore", "--from", str(place)])
        assert done.exit_code == 0, done.output
        champion = versions.find_model("champion")
        # It verifies adapter and base.
        with versions.open_model(champion) as (base, adapter):
            assert tree_digest(adapter) == digest == champion.tags[versions.DIGEST]
            assert base.is_relative_to(clone / ".nightshift/bases")
        assert git("branch", "--list", "runs/*").strip() == "runs/2026-01-31-00000001"
    finally:
        hidden.rename(original)


def test_a_second_backup_uploads_only_what_is_new(
    saved: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, place, _ = saved
    copy = shutil.copytree(place, tmp_path / "store")
    enter(monkeypatch, original)
    before = {path: path.stat().st_mtime_ns for path in (copy / "objects").iterdir()}
    monkeypatch.setattr(backup, "datetime", _Later)
    name = backup.backup(str(copy))
    after = {path: path.stat().st_mtime_ns for path in (copy / "objects").iterdir()}
    assert before.items() <= after.items()
    # At most the database, which SQLite copies page by page, and the branches.
    assert len(after) - len(before) <= 2
    assert sorted(path.stem for path in (copy / "backups").iterdir())[-1] == name
    assert backup.describe_last().endswith(f"in {copy}")


class _Later(datetime):
    """A clock that is a century ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz).replace(year=2126)


def test_a_partly_uploaded_file_is_uploaded_again(
    saved: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, place, _ = saved
    copy = shutil.copytree(place, tmp_path / "store")
    largest = max((copy / "objects").iterdir(), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[:10])
    enter(monkeypatch, original)
    backup.backup(str(copy))
    assert largest.read_bytes() == whole


@pytest.mark.usefixtures("clone")
def test_a_damaged_or_changed_backup_restores_nothing(saved: tuple[Path, Path, str], tmp_path: Path) -> None:
    copy = shutil.copytree(saved[1], tmp_path / "store")
    largest = max((copy / "objects").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[0] ^= 1
    largest.write_bytes(content)
    with pytest.raises(StageError, match=f"instead of {largest.name}: it is damaged; remove"):
        backup.restore(str(copy))
    (listing,) = (copy / "backups").iterdir()
    files = json.loads(listing.read_text())
    listing.write_text(json.dumps({"../../outside": files[backup.DATABASE]}))
    with pytest.raises(StageError, match="outside the state folder; it was changed"):
        backup.restore(str(copy))
    assert [path.name for path in state_dir().iterdir()] == []


def test_a_registry_is_never_replaced(
    saved: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    enter(monkeypatch, saved[0])
    with pytest.raises(ConfigError, match="there is a registry already; move"):
        backup.restore(str(saved[1]))
    enter(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="there is no backup"):
        backup.restore(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="so nothing to back up"):
        backup.backup(str(tmp_path / "nowhere"))
    with pytest.raises(StageError, match="Protocol not known"):
        backup.restore("nonsense://x")
