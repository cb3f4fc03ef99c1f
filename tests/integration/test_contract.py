"""Contracts between dvc.yaml, params.yaml and the code that keep DVC from serving stale results."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from nightshift.core import paths
from nightshift.pipeline.graph import outputs, read_stages, stage_order
from tasks.check import section_schemas
from tasks.evaluate import __main__ as evaluate
from tasks.sft import __main__ as sft
from tests.helpers.checkouts import BIN, ROOT
from tests.helpers.checkouts import FOLDERS as PACKAGES
from tests.helpers.imports import imports

STAGES = read_stages(ROOT / "dvc.yaml")
# Libraries that stages import but that do not affect results: formats, processes, output, clients of servers.
NO_EFFECT_ON_RESULTS = {
    *("aiolimiter", "httpx", "mlflow", "openai", "psutil", "pyarrow", "pydantic", "pyyaml", "rich", "tqdm"),
}
NEEDS_NO_TORCH = ("ingest", "dedupe", "split", "augment", "decontaminate", "gate")


def sources_of(stage: str) -> list[Path]:
    """Return the files of a stage: its module, or all modules in its folder."""
    folder = ROOT / "tasks" / stage
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(file: Path) -> Iterator[Path]:
    """Yield the project files that a file imports, at any nesting level."""
    for name in imports(file):
        path = ROOT.joinpath(*name.split("."))
        for found in (path.with_suffix(".py"), path / "__init__.py"):
            if name.startswith(("nightshift.", "tasks.")) and found.is_file() and does_something(found):
                yield found


def does_something(file: Path) -> bool:
    """Return whether a file contains more than a docstring."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(not isinstance(node, ast.Expr) for node in body)


def closure(stage: str) -> set[str]:
    """Return the paths, relative to the root, of all code that a stage runs."""
    seen: set[Path] = set()
    todo = sources_of(stage)
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += imported(file)
    return {path.relative_to(ROOT).as_posix() for path in seen}


def test_the_stages_are_in_the_same_order_as_in_dvc() -> None:
    order = stage_order(ROOT / "dvc.yaml")
    dot = subprocess.run(
        [str(BIN / "dvc"), "dag", "--dot"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    edges = [line.strip().rstrip(";").split(" -> ") for line in dot.splitlines() if "->" in line]
    pairs = [(a.strip('"'), b.strip('"')) for a, b in edges]
    pairs = [(a, b) for a, b in pairs if a in order and b in order]
    assert len(pairs) >= len(STAGES) - 1 >= 10
    assert all(order.index(before) < order.index(after) for before, after in pairs)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_all_code_that_it_runs(stage: str) -> None:
    declared = set(STAGES[stage]["deps"])
    missing = {path for path in closure(stage) if not declared & {path, *map(str, Path(path).parents)}}
    assert missing == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_no_code_that_it_does_not_run(stage: str) -> None:
    deps = [path for path in STAGES[stage]["deps"] if path.startswith(("nightshift/", "tasks/"))]
    # Chat templates are data, which a stage reads.
    code = [path for path in deps if path.endswith(".py") or any((ROOT / path).rglob("*.py"))]
    run = closure(stage)
    assert [p for p in code if p not in run and not any(q.startswith(f"{p}/") for q in run)] == []


@pytest.mark.parametrize(("stage", "engines"), [("evaluate", evaluate.ENGINES), ("sft", sft.ENGINES)])
def test_a_library_that_a_stage_imports_is_an_engine(stage: str, engines: tuple[str, ...]) -> None:
    known = packages_distributions()
    names = {name.partition(".")[0] for path in closure(stage) for name in imports(ROOT / path)}
    libraries = {name: {one.lower().replace("_", "-") for one in known.get(name, ())} for name in names}
    libraries = {
        name: found for name, found in libraries.items() if found and name not in ("nightshift", "tasks")
    }
    assert len(libraries) > 10
    accounted = {*engines, *NO_EFFECT_ON_RESULTS}
    assert [name for name, found in libraries.items() if not found & accounted] == []


def test_code_outside_the_training_key_does_not_affect_the_result() -> None:
    """Code for display, tracking and estimates is used only here, where it does not affect training."""
    excluded, imported_names = set(sft.NO_EFFECT_ON_RESULT), dict[str, set[str]]()
    code = closure("sft")
    assert excluded < code
    for path in code - excluded:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in (alias.name for alias in node.names):
                    module = f"{node.module}.{name}".replace(".", "/")
                    if f"{node.module.replace('.', '/')}.py" in excluded or f"{module}.py" in excluded:
                        imported_names.setdefault(path, set()).add(name)
    assert imported_names == {
        "tasks/sft/__main__.py": {"largest_batch", "spool", "tracking_uri"},
        "tasks/sft/result.py": {"spool"},
        "tasks/sft/backend.py": {"Batch", "estimate_all", "totals"},
        "tasks/sft/launch.py": {"line_printer"},
        "tasks/sft/worker.py": {"Progress"},
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_same_name_everywhere(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert STAGES[stage]["cmd"] == f"python -m tasks.{stage}"
    assert stage in section_schemas()
    assert f"data/{stage}/summary.json" in outputs(STAGES[stage])
    if stage == "snapshot":
        # It queries the registry, and its outputs have their own names.
        assert STAGES[stage]["params"] == ["registry.model_name", "sft.start_from", "snapshot"]
        assert set(outputs(STAGES[stage])) == {
            *("data/benchmarks", "data/champion", "data/raw", "data/start", "data/snapshot/summary.json")
        }
        return
    # Preference tuning continues a training with its parameters.
    assert STAGES[stage]["params"] == ([stage, "sft"] if stage == "prefer" else [stage])
    assert all(path.startswith(f"data/{stage}/") for path in outputs(STAGES[stage]))


def data_paths(file: Path) -> set[str]:
    """Return the paths below data/ that a file imports by name."""
    names = {
        alias.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "nightshift.core.paths"
        for alias in node.names
    }
    return {getattr(paths, name).as_posix() for name in names - {"DATA"}}


@pytest.mark.parametrize("stage", STAGES)
def test_every_data_path_in_the_code_is_declared(stage: str) -> None:
    declared = [*STAGES[stage]["deps"], *outputs(STAGES[stage])]
    found = set().union(*map(data_paths, sources_of(stage)))
    assert len(found) > 0
    for path in found:
        assert any(path == d or path.startswith(f"{d}/") or d.startswith(f"{path}/") for d in declared), path


def test_a_data_path_is_defined_once() -> None:
    named = [path.as_posix() for name, path in vars(paths).items() if name.isupper() and name != "DATA"]
    assert len(named) == len(set(named)) > 30
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "paths.py":
                text = ast.unparse(ast.parse(file.read_text(encoding="utf-8")))
                assert "DATA / '" not in text.replace("DATA / stage", ""), file
                assert "Path('data/" not in text, file


def test_only_the_snapshot_has_outputs_that_disable_the_run_cache() -> None:
    for stage, definition in STAGES.items():
        for entry in [*definition["outs"], *definition["metrics"]]:
            if stage != "snapshot":
                assert isinstance(entry, str), f"{entry}: persist and cache: false re-run the stage"


def test_the_outputs_of_the_snapshot_persist() -> None:
    assert STAGES["snapshot"]["outs"] == [
        {name: {"persist": True}} for name in ("data/benchmarks", "data/champion", "data/raw", "data/start")
    ]


def loaded_modules(code: str) -> set[str]:
    """Return the modules loaded at the end of a program that runs in a separate process."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_data_stages_flows_and_the_command_line_do_not_load_torch() -> None:
    modules = [
        f"tasks.{name}" for name in (*NEEDS_NO_TORCH, "check", "snapshot", "register", "promote", "report")
    ]
    modules += [
        f"tasks.{name}.__main__" for name in ("ingest", "dedupe", "augment", "prefer", "gate", "report")
    ]
    modules += ["flows.finetune", "flows.promote", "infra.cli.app"]
    loaded = loaded_modules("\n".join(f"import {name}" for name in modules))
    assert "tasks.ingest" in loaded
    assert "torch" not in loaded


def modules_of(package: str) -> list[str]:
    """Return the names of all modules of a package that can be imported without being run."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_neither_the_library_nor_a_stage_loads_prefect() -> None:
    names = [*modules_of("nightshift"), *modules_of("tasks")]
    assert len(names) > 120
    assert "prefect" not in loaded_modules("\n".join(f"import {name}" for name in names))
