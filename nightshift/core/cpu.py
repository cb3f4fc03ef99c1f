"""What the CPU supports, and whether there is more than a CPU."""

import ctypes
from pathlib import Path


def cpu_has_bf16() -> bool:
    """Return whether the CPU flags include bf16."""
    return "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def cpu_flags() -> set[str]:
    """Return the flags of the CPU, such as avx512_bf16; empty if the system does not list them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def may_have_gpu() -> bool:
    """Return whether torch should be asked for a GPU, which takes a second: there is a driver of one."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
