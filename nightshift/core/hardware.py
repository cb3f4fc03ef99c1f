"""What this machine has: features of the CPU, memory, the driver of a GPU."""

import ctypes
import os
from pathlib import Path


def cpu_has_bf16() -> bool:
    """Return whether the CPU flags include bf16."""
    return "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def cpu_flags() -> set[str]:
    """Return the flags of the CPU, such as avx512_bf16; empty if the system does not list them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def available_memory() -> int:
    """Return the bytes of memory available to this process: those of the machine or its container."""
    limit = Path("/sys/fs/cgroup/memory.max")
    maximum = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed if maximum == "max" else min(installed, int(maximum))


def may_have_gpu() -> bool:
    """Return whether torch should be asked for a GPU, which takes a second: there is a driver of one."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
