"""The commands in README and docs exist, with the arguments that are printed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from dvc.cli import parse_args  # type: ignore[import-untyped]

from infra.cli.app import app
from tests.helpers.checkouts import ROOT

FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def documented(program: str) -> list[tuple[str, str]]:
    """Return (file, command) of every command of a program in backticks."""
    found = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        found += [(file.name, " ".join(one.split())) for one in re.findall(rf"`({program} [^`]+)`", text)]
    return sorted(set(found))


@pytest.mark.parametrize(("file", "command"), documented("nightshift"))
def test_nightshift_accepts_a_documented_command(file: str, command: str) -> None:
    group: Any = typer.main.get_command(app)
    verb, *arguments = shlex.split(command.removeprefix("nightshift "))
    assert verb in group.commands, file
    # A verb alone is its name in a sentence.
    if arguments and "..." not in arguments:
        group.commands[verb].make_context(verb, arguments)


@pytest.mark.parametrize(("file", "command"), documented("make"))
def test_a_documented_make_target_exists(file: str, command: str) -> None:
    assert command.split()[1] in TARGETS, file


@pytest.mark.parametrize(("file", "command"), documented("dvc"))
def test_dvc_accepts_a_documented_command(file: str, command: str) -> None:
    assert parse_args(shlex.split(command)[1:]), file


@pytest.mark.parametrize(("file", "command"), documented("python -m"))
def test_a_documented_module_exists(file: str, command: str) -> None:
    module = command.split()[2].replace(".", "/")
    is_own = module.split("/")[0] in ("tasks", "benchmarks", "infra", "tests", "nightshift")
    found = [ROOT / f"{module}.py", ROOT / module / "__main__.py"]
    assert not is_own or "<" in module or any(map(Path.is_file, found)), file
