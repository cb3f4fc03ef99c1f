"""Record measurements: claim, value, bound, and where it was measured."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nightshift.core.files import write_figures

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def record(
    claim: str,
    value: float,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    **more: Any,
) -> Record:
    """Describe one measurement and whether it is within its bound.

    Example:
        >>> record("recall", 0.996, "share", at_least=0.99)["holds"]
        True
    """
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = {"at_least": at_least, "at_most": at_most}
    return {
        "claim": claim,
        "value": value,
        "unit": unit,
        "bound": {key: limit for key, limit in bound.items() if limit is not None},
        "holds": holds,
        **more,
    }


def write_records(
    name: str, records: Sequence[Record], packages: Sequence[str], folder: Path | None = None
) -> None:
    """Write records, hardware, versions and commit to `<name>.json` in a folder (default: results)."""
    measured = about(packages)
    write_figures((folder or RESULTS) / f"{name}.json", [{**one, **measured} for one in records])


def about(packages: Sequence[str]) -> Record:
    """Return the hardware, the package versions, and the commit."""
    return {
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count(), "memory_gib": memory_gib()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "commit": commit(),
    }


def require_bounds(records: Sequence[Record]) -> None:
    """Check that every measurement is within its bound.

    Raises:
        SystemExit: A measurement is not; all violations are listed.
    """
    if broken := [one["claim"] for one in records if not one["holds"]]:
        raise SystemExit(f"out of bounds: {'; '.join(broken)}")


def cpu_model() -> str:
    """Return the name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def memory_gib() -> float:
    """Return the memory of the machine, in GiB."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def commit() -> str:
    """Return the commit of the measured code, with `+` if the tree differs; `unknown` without git."""
    if not shutil.which("git"):
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (head := git("rev-parse", "--short", "HEAD")):
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "-uno") else "")
