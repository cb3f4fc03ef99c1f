"""What the CPU supports."""

from pathlib import Path


def cpu_has_bf16() -> bool:
    """Return whether the CPU flags include bf16."""
    return "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
