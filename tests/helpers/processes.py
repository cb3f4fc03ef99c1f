"""What tests ask of other processes, which may end at any moment."""

import contextlib

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Return the command line of a process; empty once it has ended, also of a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []
