"""Import rules: the library imports nothing above it, stages no orchestration, flows no torch.

nightshift <- tasks <- flows, infra. A stage imports no code of another stage; shared code belongs to the
library.
"""

from collections import defaultdict

from tests.helpers.checkouts import FOLDERS, ROOT
from tests.helpers.imports import imports

# Other packages that a package may import.
MAY_IMPORT = {
    "nightshift": set[str](),
    "tasks": {"nightshift"},
    "flows": {"nightshift", "tasks"},
    "infra": {"nightshift", "tasks"},
}
# Parts of the library, bottom up: each may import the parts before it.
LIBRARY = ("core", "hub", "data", "raw", "replies", "tracking", "pipeline", "registry")
# Libraries that a package must not import.
NEVER = {
    "nightshift": {"prefect", "deepspeed", "trl"},
    "tasks": {"prefect"},
    "flows": {"torch", "transformers", "trl", "peft", "deepspeed"},
}
# Programs after the graph that read another one's parameters or words, and the second stage that trains: both
# are launched, planned, resumed and proven by the same code, which needs DeepSpeed and TRL (decision 19).
SHARED = {("register", "gate"), ("report", "gate"), ("report", "judge"), ("prefer", "sft")}


def imported_by(package: str) -> dict[str, set[str]]:
    """Return part of a package -> modules that it imports."""
    found = defaultdict(set)
    for file in (ROOT / package).rglob("*.py"):
        part = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        found[part] |= set(imports(file))
    return found


def test_a_package_imports_only_lower_layers() -> None:
    for package in FOLDERS:
        for part, modules in imported_by(package).items():
            tops = {module.partition(".")[0] for module in modules}
            others = tops.intersection(FOLDERS) - {package}
            assert others <= MAY_IMPORT[package], f"{package}/{part} imports {others}"
            assert not tops & NEVER.get(package, set()), f"{package}/{part}"


def test_library_parts_import_only_lower_parts() -> None:
    found = imported_by("nightshift")
    assert set(found) == {*LIBRARY, "__init__"}
    for part in LIBRARY:
        used = {module.split(".")[1] for module in found[part] if module.startswith("nightshift.")}
        before = set(LIBRARY[: LIBRARY.index(part) + 1])
        assert used <= before, f"nightshift/{part} imports {used - before}"


def test_a_stage_imports_no_other_stage() -> None:
    imported = set()
    for part, modules in imported_by("tasks").items():
        others = {module.split(".")[1] for module in modules if module.startswith("tasks.")} - {part}
        imported |= {(part, other) for other in others}
    assert imported == SHARED
