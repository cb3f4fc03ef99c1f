"""Command lines of all programs: `--help` has no side effects, unknown arguments are refused.

Each program runs in a separate process and an empty folder. All are forked from one process that has
already imported their modules, so that torch and similar libraries are loaded once.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkouts import ROOT

# Reads {module: [command lines]} from stdin, writes {module: [[exit code, stdout, stderr, files], ...]}.
RUNNER = '''
import importlib, json, os, runpy, signal, sys, tempfile

def run(module, arguments):
    """Run a program as `python -m` does, in a fork; a program that does not end at once is killed."""
    folder, outputs = tempfile.mkdtemp(dir="."), tempfile.mkdtemp(dir=".")
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{outputs}/{name}", os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        signal.alarm(20)
        sys.argv = [module, *arguments]
        del sys.modules[module]
        code = 0
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [open(f"{outputs}/{name}", encoding="utf-8").read() for name in ("stdout", "stderr")]
    return [code, *texts, os.listdir(folder)]

programs = json.load(sys.stdin)
for module in programs:
    importlib.import_module(module)
found = {module: [run(module, line) for line in lines] for module, lines in programs.items()}
json.dump(found, open("found.json", "w"))
'''
UNKNOWN = (["--max-steps", "3"], ["--max-steps=3"], ["--hel"], ["surplus"] * 9)
FOLDERS = ("nightshift", "tasks", "flows", "infra", "benchmarks")


def is_program(file: Path) -> bool:
    """Return whether a module does something when it is run."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(n, ast.If) and ast.unparse(n.test) == "__name__ == '__main__'" for n in body)


PROGRAMS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*.py")
    if is_program(file)
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("programs")
    lines = {module: [["--help"], *UNKNOWN] for module in PROGRAMS}
    subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=folder,
        env={**clean_environment, "PYTHONPATH": str(ROOT)},
        input=json.dumps(lines),
        text=True,
        check=True,
    )
    results: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return results


def test_the_programs_are_found() -> None:
    assert len(PROGRAMS) >= 25
    some = {"tasks.sft.__main__", "tasks.judge", "nightshift.pipeline.supervise", "benchmarks.gpu"}
    assert some <= set(PROGRAMS)


@pytest.mark.parametrize("module", PROGRAMS)
def test_help_describes_a_program_and_has_no_side_effects(module: str, found: dict[str, Any]) -> None:
    code, stdout, stderr, files = found[module][0]
    assert (code, stderr, files) == (0, "", [])
    docstring = ast.get_docstring(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")))
    assert docstring
    assert stdout.startswith("usage: ")
    assert docstring.splitlines()[0] in stdout


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_rejects_unknown_arguments_and_has_no_side_effects(
    module: str, found: dict[str, Any]
) -> None:
    assert len(found[module]) == 1 + len(UNKNOWN)
    for (code, stdout, stderr, files), arguments in zip(found[module][1:], UNKNOWN, strict=True):
        assert (code, stdout, files) == (2, "", []), (arguments, stderr)
        assert "usage: " in stderr
        assert stderr.splitlines()[-1].split(": ", 1)[1].startswith("error: "), stderr


def test_a_manual_promotion_requires_a_reason() -> None:
    command = [sys.executable, "-m", "tasks.promote", "--acknowledge", "--reason= "]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --reason is required; it is stored in the promotion record\n"
