"""Run a command and leave no process behind, whichever process is killed. Linux only.

`run` starts this file as a program, the supervisor, in a separate session; the supervisor starts the
command. As a "child subreaper" it adopts every descendant whose parent died, even after setsid or a
double fork. Which process is killed with -9, and what cleans up:

- the caller of `run`: the kernel sends SIGTERM to the supervisor, which ends the tree;
- the command or a descendant: the supervisor ends the rest once the command is dead;
- the supervisor: the kernel kills the command; `run` finds the rest by its session and by a mark in its
  environment. If the caller is killed at the same moment, descendants of the command can survive, unless
  they called `die_with_parent`.

A process below two supervisors gets SIGTERM from both: its handler must allow for that.
"""

import argparse
import contextlib
import ctypes
import logging
import math
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import psutil

MARK = "NIGHTSHIFT_PROCESS_TREE"
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# A command's helpers (multiprocessing's resource tracker) exit by themselves shortly after it.
SETTLE_SECONDS = 0.5
# A rank that holds GPU memory takes seconds to exit after SIGKILL.
KILL_SECONDS = 8.0
POLL_SECONDS = 0.1
PIPE_BYTES = 65536  # capacity of a Linux pipe: one read of this size empties it
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LIBC = ctypes.CDLL(None, use_errno=True)
log = logging.getLogger(__name__)


def run(
    command: Sequence[str],
    *,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    grace_seconds: float = 10.0,
) -> int:
    r"""Run a command to its end, forward its output, and leave none of its processes behind.

    However this function ends (an exception in `on_line`, KeyboardInterrupt, SystemExit from a signal
    handler), the whole process tree gets SIGTERM, SIGKILL after `grace_seconds`, and is gone on return.
    Output during the grace period still reaches `on_line`, unless `on_line` itself failed.

    Args:
        command: Program and arguments, run without a shell and with empty stdin.
        on_line: Callback for each line of stdout and stderr, without line ending. A progress bar's
            carriage return also ends a line; blank lines are skipped. A slow callback slows the command.
        env: Environment variables added to those of this process.
        grace_seconds: Time between SIGTERM and SIGKILL, seconds.

    Returns:
        Exit code of the command, or 128 + signal. 0 does not prove success: `deepspeed` can return 0
        when a rank failed.

    Raises:
        StageError: The program does not exist.

    Example:
        >>> lines = []
        >>> run(["sh", "-c", r"printf '1/2\r2/2\n'; exit 3"], on_line=lines.append)
        3
        >>> lines
        ['1/2', '2/2']
    """
    environment = {**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"}
    # A nested run extends the mark, so that the outer run finds all processes.
    mark = environment[MARK] = f"{os.environ.get(MARK, '')}/{secrets.token_hex(8)}"
    _require_program(command[0], environment.get("PATH"))
    supervisor = _start(command, environment, grace_seconds)
    listener: Callable[[str], None] | None = on_line
    try:
        for line in _read_lines(supervisor):
            on_line(line)
        return _exit_code(supervisor, os.WEXITED) or 0
    except Exception:
        listener = None
        raise
    finally:
        _end(supervisor, mark, grace_seconds, listener)


def die_with_parent(parent: int | None = None, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when its parent dies.

    "Parent" is the thread that forked this process: its end counts as a death, even if the parent
    process lives on. (The thread that called `run` waits in it, so it cannot end first.) The request is
    lost on fork and on exec of a set-user-ID program.

    Args:
        parent: Process id of the parent, if known: if it died before this call, the signal is sent
            immediately. Without it, an earlier death goes unnoticed.
        signum: Signal to receive.

    Raises:
        OSError: The kernel refused.
    """
    _prctl(PR_SET_PDEATHSIG, signum)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


def main(arguments: Sequence[str]) -> int:
    """Act as the supervisor: run the command after `--`, then end its whole process tree.

    Args:
        arguments: `[--grace SECONDS] [--parent PID] -- COMMAND...`; the supervisor ends its tree on
            SIGTERM, SIGINT or SIGHUP, and when the parent dies.

    Returns:
        Exit code of the command, 128 + signal, or 127 if it could not be started.
    """
    options, command = _parse(arguments)
    # Blocked signals stay pending until `_run_to_end` waits for them: no handler, no race with a fork.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING | {signal.SIGCHLD})
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(options.parent, signal.SIGTERM)
    try:
        # Separate process group: `kill 0` in the command must not reach the supervisor.
        child = subprocess.Popen(command, process_group=0, preexec_fn=partial(_before_exec, os.getpid()))
    except OSError as err:
        _report([f"{command[0]}: cannot be started: {err.strerror}"])
        return 127
    notes: list[str] = []
    killed: dict[psutil.Process, str] = {}
    try:
        _run_to_end(child, options.grace, notes)
    finally:
        _wait_childless(child, KILL_SECONDS, partial(_kill, killed))
        _report(notes + [f"{name} did not end within its grace period; killed" for name in killed.values()])
    code = -signal.SIGKILL if child.returncode is None else child.returncode
    return code if code >= 0 else 128 - code


def _require_program(name: str, path: str | None) -> None:
    """Raise StageError if the program does not exist."""
    if shutil.which(name, path=path) is None:
        # Imported here: the supervisor runs as a file and cannot import the package.
        from nightshift.core.errors import StageError

        raise StageError(f"{name}: not found on PATH; install it, or add its folder to PATH")


def _start(
    command: Sequence[str], environment: Mapping[str, str], grace_seconds: float
) -> subprocess.Popen[bytes]:
    """Start the supervisor. There is no preexec_fn: the caller may have threads."""
    return subprocess.Popen(
        [
            sys.executable,
            # By path: the working directory may contain another version of `tasks`. With -P: no
            # module next to this file can shadow a library.
            *("-P", __file__, f"--grace={grace_seconds}", f"--parent={os.getpid()}", "--"),
            *command,
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _read_lines(supervisor: subprocess.Popen[bytes], deadline: float = math.inf) -> Iterator[str]:
    """Yield output until the pipe closes, the supervisor is dead or the deadline has passed.

    A supervisor that was killed with -9 leaves processes that hold the pipe open: waiting for the end of
    the pipe alone could block forever.
    """
    assert supervisor.stdout
    stream = supervisor.stdout.fileno()
    poller = select.poll()
    poller.register(stream, select.POLLIN)
    rest, chunk, is_dead = b"", None, False
    while chunk != b"" and not is_dead and time.monotonic() < deadline:
        # Checked before the read, so that the last read gets all output from before the death.
        is_dead = _exit_code(supervisor, os.WEXITED | os.WNOHANG) is not None
        if poller.poll(0 if is_dead else 1000 * POLL_SECONDS):
            chunk = os.read(stream, PIPE_BYTES)
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            yield from (line.decode(errors="replace") for line in lines if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace")


def _exit_code(process: subprocess.Popen[bytes], options: int) -> int | None:
    """Return a child's exit code, None while it runs. It is not reaped, so its pid is not reused."""
    result = os.waitid(os.P_PID, process.pid, options | os.WNOWAIT)
    if result is None:
        return None
    return result.si_status + (0 if result.si_code == os.CLD_EXITED else 128)


def _end(
    supervisor: subprocess.Popen[bytes],
    mark: str,
    grace_seconds: float,
    listener: Callable[[str], None] | None,
) -> None:
    """Let the supervisor end the tree, then kill what is left, including the supervisor."""
    try:
        if _exit_code(supervisor, os.WEXITED | os.WNOHANG) is None:
            os.kill(supervisor.pid, signal.SIGTERM)
            patience = SETTLE_SECONDS + grace_seconds + KILL_SECONDS + 1
            for line in _read_lines(supervisor, time.monotonic() + patience):
                if listener:
                    listener(line)
    finally:
        deadline = time.monotonic() + KILL_SECONDS
        killed: set[psutil.Process] = set()
        while (found := _find_members(supervisor.pid, mark)) and time.monotonic() < deadline:
            for process in found:
                if process.pid != supervisor.pid and process not in killed:
                    log.warning("%s outlived its supervisor; killed", _describe(process))
                with contextlib.suppress(psutil.Error):
                    process.kill()
            killed.update(found)
            time.sleep(POLL_SECONDS)
        assert supervisor.stdout
        supervisor.stdout.close()
        supervisor.wait()


def _find_members(session: int, mark: str) -> list[psutil.Process]:
    """Find the live processes of a session, and those with the mark in their environment."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and (
                os.getsid(process.pid) == session or process.environ().get(MARK, "").startswith(mark)
            ):
                members.append(process)
    return members


def _prctl(option: int, value: int) -> None:
    """Set one attribute of this process with prctl."""
    if LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Sequence[str]]:
    """Split the supervisor's options from the command."""
    parser = argparse.ArgumentParser(
        prog="python -m nightshift.pipeline.supervise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--grace SECONDS] [--parent PID] -- COMMAND...",
    )
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument(
        "--parent", type=int, default=os.getppid(), help="process id; its death ends the tree"
    )
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    if not arguments[at + 1 :]:
        parser.error("no command after --")
    return options, arguments[at + 1 :]


def _before_exec(parent: int) -> None:
    """Prepare the command's process. Safe after a fork: the supervisor has one thread."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    die_with_parent(parent)


def _run_to_end(child: subprocess.Popen[bytes], grace_seconds: float, notes: list[str]) -> None:
    """Wait for the command or a signal, then ask the rest of the tree to end within the grace period."""
    signum: int = signal.SIGCHLD
    while _reap(child) and child.returncode is None and signum == signal.SIGCHLD:
        signum = signal.sigwait(ENDING | {signal.SIGCHLD})
    if signum == signal.SIGCHLD:
        signum = signal.SIGTERM
        if not _wait_childless(child, SETTLE_SECONDS, lambda: None):
            left = psutil.Process().children(recursive=True)
            notes += [f"{_describe(process)} outlived its command; ended" for process in left]
    signaled: set[psutil.Process] = set()
    _wait_childless(child, grace_seconds, partial(_send_signal, signaled, signum))


def _send_signal(signaled: set[psutil.Process], signum: int) -> None:
    """Send the signal to all descendants at first, later only to new orphans.

    A child that a process starts in its grace period, to save work, stays while its parent lives.
    """
    for process in psutil.Process().children(recursive=not signaled):
        if process not in signaled:
            signaled.add(process)
            with contextlib.suppress(psutil.Error):
                process.send_signal(signum)


def _kill(killed: dict[psutil.Process, str]) -> None:
    """Kill all descendants, and keep the descriptions of new ones."""
    for process in psutil.Process().children(recursive=True):
        killed.setdefault(process, _describe(process))
        with contextlib.suppress(psutil.Error):
            process.kill()


def _wait_childless(child: subprocess.Popen[bytes], seconds: float, act: Callable[[], None]) -> bool:
    """Call `act` and reap repeatedly until no child is left (True) or time is up (False)."""
    deadline = time.monotonic() + seconds
    while _reap(child):
        act()
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, min(POLL_SECONDS, remaining))
    return True


def _reap(child: subprocess.Popen[bytes]) -> bool:
    """Reap every dead child, record the command's exit code; return whether live children are left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return True
            if pid == child.pid:
                child.returncode = os.waitstatus_to_exitcode(status)
    return False


def _describe(process: psutil.Process) -> str:
    """Format a process for a message."""
    try:
        return f"pid {process.pid} ({' '.join(process.cmdline())})"
    except psutil.Error:
        return f"pid {process.pid}"


def _report(notes: Sequence[str]) -> None:
    """Write lines to stderr, whose reader may be dead."""
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"supervise: {note}\n" for note in notes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
