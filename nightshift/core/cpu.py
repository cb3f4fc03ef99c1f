"""What the CPU supports."""

from pathlib import Path


def cpu_has_bf16() -> bool:
    """Return whether the CPU flags include bf16."""
    return "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def cpu_flags() -> set[str]:
    """Return the flags of the CPU, such as avx512_bf16; empty if the system does not list them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
