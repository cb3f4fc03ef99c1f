"""Find the errors in the logs of the local services that docs/operations.md does not explain."""

import re
from pathlib import Path

# Start of a message with its level, in the formats of Prefect, uvicorn and MLflow.
MESSAGE = re.compile(r"(?:[\d:.]{12} \| |\d{4}/\d{2}/\d{2} [\d:]{8} )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
TRACEBACK = "Traceback (most recent call last)"
# Each is explained in docs/operations.md, under "What the logs may say".
EXPLAINED = (
    "FlowRunCancellingObserver",
    "FlowRunSuspendingObserver",
    "Service 'EventsWorker' failed",
    "database is locked",
)


def unexplained(log: Path) -> list[str]:
    """List the unexplained errors in a service's log; empty if there is no log.

    Args:
        log: Log file of a service since its last start.

    Returns:
        First line of each error; a traceback adds the line with the exception.
    """
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [error for error in find_errors(lines) if not any(known in error for known in EXPLAINED)]


def find_errors(lines: list[str]) -> list[str]:
    r"""Find the errors in the lines of a log: messages above WARNING, and tracebacks.

    A traceback, and the tracebacks that follow it, belong to the message before, whatever its level.

    Example:
        >>> find_errors(["12:00:01.000 | INFO    | x - up", "12:00:02.000 | ERROR   | x - down"])
        ['12:00:02.000 | ERROR   | x - down']
        >>> find_errors(["INFO: odd", "Traceback (most recent call last):", '  File "a.py"', "KeyError: 1"])
        ['INFO: odd: KeyError: 1']
    """
    found: list[str] = []
    message, is_error, is_traceback = "", False, False
    for line in filter(str.strip, lines):
        if is_traceback:
            if not line.startswith((" ", "\t")):
                is_traceback = False
                text = f"{message}: {line}" if message else line
                found = [*found[:-1], text] if is_error else [*found, text]
                is_error = True
        elif TRACEBACK in line:
            is_traceback = True
        elif level := MESSAGE.match(line):
            message, is_error = line, level[1] in ("ERROR", "CRITICAL")
            found += [line] if is_error else []
    return found
