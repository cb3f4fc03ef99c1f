"""`make clean` keeps everything that cannot be installed again; `make purge` asks first."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.checkouts import ROOT

KEPT = (
    "data/raw/facts/000001.jsonl",
    ".dvc/cache/files",
    ".nightshift/mlflow.db",
    ".dvc/remote/files",
)
INSTALLED = (".venv/lib", ".kit/a.whl", ".nightshift/kernels/a.so", ".nightshift/torch-extensions/op.so")


@pytest.fixture
def checkout(in_tmp: Path) -> Path:
    shutil.copy(ROOT / "Makefile", in_tmp)
    for name in (*KEPT, *INSTALLED):
        (in_tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (in_tmp / name).write_text("x")
    return in_tmp


def make(*arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], input=answer, capture_output=True, text=True, check=False)


def existing(checkout: Path) -> set[str]:
    return {name for name in (*KEPT, *INSTALLED) if (checkout / name).exists()}


def test_clean_deletes_only_what_is_installed_and_compiled(checkout: Path) -> None:
    assert make("clean").returncode == 0
    assert existing(checkout) == set(KEPT)


@pytest.mark.parametrize("answer", ["", "n\n", "\n"])
def test_purge_without_consent_deletes_nothing(checkout: Path, answer: str) -> None:
    done = make("purge", answer=answer)
    assert done.returncode != 0
    assert {"data", ".dvc/cache", ".dvc/remote", ".nightshift"} <= set(done.stdout.split())
    assert existing(checkout) == {*KEPT, *INSTALLED}


def test_purge_leaves_a_state_folder_elsewhere_and_says_so(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(home))
    done = make("purge", "YES=1")
    assert f"NIGHTSHIFT_HOME={home} stays, with the registry in it" in done.stdout
    assert home.exists()


@pytest.mark.parametrize(("arguments", "answer"), [(("YES=1",), ""), ((), "y\n")])
def test_purge_with_consent_deletes_all_but_the_code(
    checkout: Path, arguments: tuple[str, ...], answer: str
) -> None:
    assert make("purge", *arguments, answer=answer).returncode == 0
    assert existing(checkout) == set()
    assert (checkout / "Makefile").exists()
