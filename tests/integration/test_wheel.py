"""The built wheel without the checkout, and the project's installation instructions."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.helpers.checkouts import FOLDERS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
# Without `site` no .pth file is read, so the editable install of the checkout is not found.
PYTHON = (sys.executable, "-S")
NEEDS_THE_CHECKOUT = {"infra/install.sh", "infra/gpu_kit/enter.sh", "infra/gpu_kit/fill.sh"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout with the installed packages only."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder


def run_installed(installed: Path, folder: Path, code: str) -> str:
    """Run code with the installed wheel in a folder without project files."""
    paths = [str(installed), sysconfig.get_paths()["purelib"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*PYTHON, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def project_files() -> set[str]:
    """Return all files of the packages, relative to the root."""
    files = (path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_contains_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    files = project_files()
    assert len(files) > 140
    assert "tasks/report/page.html.jinja" in files
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files - NEEDS_THE_CHECKOUT


def test_every_module_of_the_wheel_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    files = sorted(name for name in project_files() if name.endswith(".py"))
    modules = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in files]
    code = f"import importlib\nfor name in {modules}:\n    print(importlib.import_module(name).__file__)\n"
    assert run_installed(installed, tmp_path, code).splitlines() == [str(installed / name) for name in files]


def test_the_wheel_finds_its_data_and_its_command(installed: Path, tmp_path: Path) -> None:
    code = (
        "from infra.cli.app import app\n"
        "from tasks.report.__main__ import open_templates\n"
        "print(len([open_templates().get_template(f'page.{kind}.jinja') for kind in ('html', 'md')]))\n"
        "app(['--help'])\n"
    )
    number, *usage = run_installed(installed, tmp_path, code).splitlines()
    assert number == "2"
    assert "Retrain a language model every night" in "\n".join(usage)


def project_texts() -> dict[str, str]:
    """Return path -> text of the tracked files, without benchmark results, images and this test."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    others = ("benchmarks/results/", "docs/images/")
    names = [name for name in listed.splitlines() if not name.startswith(others)]
    texts = {name: (ROOT / name).read_text("utf-8") for name in names if (ROOT / name).is_file()}
    return {name: text for name, text in texts.items() if name != Path(__file__).relative_to(ROOT).as_posix()}


# On PyPI `nightshift` is another project; this one is installed from a checkout.
PYPI_NAMESAKE = re.compile(r"\bnightshift\\?\[|\bpip install [^\n]*\bnightshift\b")
OWN_EXTRA = re.compile(r"(?:-e|--editable) ['\"]?\\?\.\\?\[([a-z0-9{}]+)\\?\]")
NAMED_EXTRA = re.compile(r"\b(?:the extra|extra `|, extra) ?([a-z0-9]+)")
OTHER_PACKAGE = re.compile(r"\bpip install (?!-)[`'\"]?([\w.{}\[\]-]+)")


def test_no_text_installs_the_pypi_namesake_or_an_unknown_extra() -> None:
    installs, extras = 0, 0
    for name, text in project_texts().items():
        assert not PYPI_NAMESAKE.search(text), name
        for found in OWN_EXTRA.findall(text):
            installs += 1
            assert found in EXTRAS | {"{extra}"}, name
        for found in NAMED_EXTRA.findall(text):
            extras += 1
            assert found in EXTRAS, (name, found)
    assert installs >= 5
    assert extras >= 5


def test_every_store_has_an_existing_extra() -> None:
    from tasks.snapshot.sources.stores import EXTRAS as STORES

    assert STORES == {"s3": "s3", "gs": "gcs"}
    assert set(STORES.values()) <= EXTRAS


def test_the_extra_gpu_installs_every_optional_package_of_a_training_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tasks.sft.machine import find_missing
    from tests.helpers.sft import sft_params

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    params = [
        sft_params(adapter="qlora", optim="adamw_8bit", use_liger_kernel=True),
        sft_params(
            optim="schedule_free_adamw",
            lr_scheduler_type="constant",
            warmup_steps=0,
            strategy="single",
            num_processes=1,
        ),
    ]
    missing = [line for one in params for line in find_missing(one, "cpu")]
    brought = {re.split("[>=]", one)[0] for one in PROJECT["optional-dependencies"]["gpu"]}
    packages = {line.split(" needs ")[1].split(";")[0].replace("_", "-") for line in missing}
    assert packages == {"bitsandbytes", "schedulefree", "liger-kernel"}
    assert packages <= brought
    assert all(line.endswith("run `pip install -e '.[gpu]'`") for line in missing)


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("mysql://host/x", "mysqlclient"),
        ("mysql+mysqlconnector://host/x", "mysql-connector-python"),
        ("mssql+pymssql://host/x", "pymssql"),
    ],
)
def test_a_missing_driver_is_reported_by_its_pypi_name(url: str, package: str) -> None:
    from nightshift.core.errors import ConfigError
    from tasks.snapshot.sources.database import read_query

    with pytest.raises(ConfigError, match=f"run `pip install {package}`$"):
        next(read_query("SELECT 1", url, "URL"))


def test_no_text_installs_an_unknown_package() -> None:
    found = {(name, one) for name, text in project_texts().items() for one in OTHER_PACKAGE.findall(text)}
    assert found == {
        ("docs/evaluation.md", "vllm"),
        ("docs/serving.md", "sentencepiece"),
        ("tasks/evaluate/jobs.py", "vllm"),
        ("tasks/snapshot/sources/database.py", "{driver}"),
    }
