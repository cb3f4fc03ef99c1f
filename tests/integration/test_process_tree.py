"""Fault tests on a real process tree: one process is killed, and none may be left behind.

The tree is that of a training run: caller of `run` -> supervisor -> launcher -> two ranks. Processes
are identified by pid and start time (`psutil.Process` compares both), not by pid alone.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nightshift.pipeline import supervise
from tests.helpers.checkouts import ROOT

pytestmark = pytest.mark.timeout(60)

# Traits: setsid (ranks leave the session), bare (ranks lose their environment), deaf (all ignore
# SIGTERM), leave (the launcher exits on request, its ranks stay), tied (ranks call die_with_parent).
TREE = """
import os, signal, subprocess, sys, time
from pathlib import Path

folder, role, *traits = sys.argv[1:]
if "deaf" in traits:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if role == "launcher":
    for rank in ("rank0", "rank1"):
        subprocess.Popen(
            [sys.executable, __file__, folder, rank, *traits],
            start_new_session="setsid" in traits,
            env={} if "bare" in traits else None,
        )
elif "tied" in traits:
    from nightshift.pipeline.supervise import die_with_parent
    die_with_parent()
Path(folder, f"{role}.new").write_text(str(os.getpid()))
Path(folder, f"{role}.new").rename(Path(folder, f"{role}.pid"))
if role != "launcher":
    time.sleep(60)
elif "leave" in traits:
    while not Path(folder, "leave").exists():
        time.sleep(0.02)
else:
    os.wait()
    sys.exit(9)
"""
# Gives up on a hung supervisor sooner than the default.
CALLER = """
import signal, sys
from pathlib import Path
from nightshift.pipeline import supervise

supervise.KILL_SECONDS = 0.5
folder, grace_seconds, *command = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
code = supervise.run(command, on_line=print, grace_seconds=float(grace_seconds))
Path(folder, "code").write_text(str(code))
"""
ROLES = ("launcher", "rank0", "rank1")
# Ancestors of the launcher, nearest first.
SHAPES = {
    "run": ["supervisor", "caller"],
    "program": ["supervisor"],
    "run in run": ["supervisor", "caller", "outer supervisor", "outer caller"],
}
both_sessions = pytest.mark.parametrize("traits", [(), ("setsid",)], ids=["session", "setsid"])

Tree = dict[str, psutil.Process]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tree]]:
    """Yield a function that starts a tree and waits until it is up; kill leftovers after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "tree.py").write_text(TREE)
    (tmp_path / "caller.py").write_text(CALLER)
    # A background shell ignores SIGINT and nohup ignores SIGHUP; the tree would inherit both.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    inherited = {signum: signal.signal(signum, handler) for signum, handler in defaults.items()}
    started: list[subprocess.Popen[bytes]] = []

    def start_tree(*traits: str, shape: str = "run", grace_seconds: float = 5.0) -> Tree:
        command = [sys.executable, str(tmp_path / "tree.py"), str(tmp_path), "launcher", *traits]
        if shape == "program":
            program = [sys.executable, supervise.__file__, f"--grace={grace_seconds}", "--"]
            command = [*program, *command]
        else:
            caller = [sys.executable, str(tmp_path / "caller.py"), str(tmp_path)]
            for _ in range(len(SHAPES[shape]) // 2):
                command = [*caller, str(grace_seconds), *command]
        started.append(subprocess.Popen(command))
        wait_until(lambda: all((tmp_path / f"{role}.pid").exists() for role in ROLES), 20.0)
        tree = {role: psutil.Process(read_int(tmp_path / f"{role}.pid")) for role in ROLES}
        tree |= dict(zip(SHAPES[shape], tree["launcher"].parents(), strict=False))
        return tree

    yield start_tree
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # Every process of the tree has the test's folder in its command line.
            if str(tmp_path) in " ".join(process.cmdline()):
                process.kill()
    for popen in started:
        popen.kill()
        popen.wait()
    for signum, handler in inherited.items():
        signal.signal(signum, handler)


def read_int(path: Path) -> int:
    return int(path.read_text())


def wait_until(is_met: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for a condition; the caller's next assertion reports a timeout."""
    deadline = time.monotonic() + seconds
    while not is_met() and time.monotonic() < deadline:
        time.sleep(0.02)


def find_alive(tree: Tree) -> list[str]:
    """Return the names of running processes. A zombie counts as dead: reaping is its parent's job."""
    alive = []
    for name, process in tree.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(name)
    return sorted(alive)


def assert_all_end(tree: Tree, seconds: float = 5.0) -> None:
    wait_until(lambda: not find_alive(tree), seconds)
    assert find_alive(tree) == []


def test_the_tree_is_up_before_a_fault_is_injected(start: Callable[..., Tree]) -> None:
    tree = start("setsid")
    assert find_alive(tree) == ["caller", "launcher", "rank0", "rank1", "supervisor"]
    parents = [process.pid for process in tree["rank0"].parents()[:3]]
    assert parents == [tree["launcher"].pid, tree["supervisor"].pid, tree["caller"].pid]


@both_sessions
def test_sigterm_to_the_supervisor_ends_all(
    start: Callable[..., Tree], tmp_path: Path, traits: tuple[str, ...]
) -> None:
    tree = start(*traits)
    tree["supervisor"].terminate()
    assert_all_end(tree)
    assert read_int(tmp_path / "code") == 143


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_the_supervisor_forwards_its_signal(start: Callable[..., Tree], signum: int, code: int) -> None:
    # Without `run` above, which would end what the supervisor misses.
    tree = start("setsid", shape="program")
    tree["supervisor"].send_signal(signum)
    assert tree["supervisor"].wait(timeout=5) == code
    assert find_alive(tree) == []


def test_a_tree_that_ignores_sigterm_is_killed_after_the_grace_period(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("setsid", "deaf", grace_seconds=0.5)
    tree["supervisor"].terminate()
    assert_all_end(tree)
    assert read_int(tmp_path / "code") == 137


@both_sessions
def test_kill_9_of_the_caller_ends_all(start: Callable[..., Tree], traits: tuple[str, ...]) -> None:
    tree = start(*traits)
    tree["caller"].kill()
    assert_all_end(tree)


def test_kill_9_of_the_caller_in_the_grace_period_ends_all(
    start: Callable[..., Tree],
) -> None:
    tree = start("setsid", "deaf", grace_seconds=1.0)
    tree["caller"].terminate()
    time.sleep(0.2)
    tree["caller"].kill()
    assert_all_end(tree)


@both_sessions
def test_a_signal_handler_of_the_caller_that_exits_ends_all(
    start: Callable[..., Tree], traits: tuple[str, ...]
) -> None:
    tree = start(*traits)
    tree["caller"].terminate()
    assert_all_end(tree)


@both_sessions
def test_kill_9_of_the_launcher_ends_its_ranks(
    start: Callable[..., Tree], tmp_path: Path, traits: tuple[str, ...]
) -> None:
    tree = start(*traits)
    tree["launcher"].kill()
    assert_all_end(tree)
    assert read_int(tmp_path / "code") == 137


def test_kill_9_of_a_rank_ends_all_when_the_launcher_gives_up(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("setsid")
    tree["rank0"].kill()
    assert_all_end(tree)
    assert read_int(tmp_path / "code") == 9


@pytest.mark.parametrize("traits", [(), ("setsid",), ("bare",)], ids=["session", "setsid", "bare"])
def test_kill_9_of_the_supervisor_ends_all_while_the_caller_lives(
    start: Callable[..., Tree], tmp_path: Path, traits: tuple[str, ...]
) -> None:
    tree = start(*traits)
    tree["supervisor"].kill()
    assert_all_end(tree)
    assert read_int(tmp_path / "code") == 137


def test_a_hung_supervisor_is_killed_with_its_tree(start: Callable[..., Tree]) -> None:
    tree = start("setsid", grace_seconds=0.2)
    tree["supervisor"].suspend()
    tree["caller"].terminate()
    assert_all_end(tree)


def test_kill_9_of_a_supervisor_without_a_caller_ends_at_least_the_command(
    start: Callable[..., Tree],
) -> None:
    tree = start("setsid", shape="program")
    tree["supervisor"].kill()
    wait_until(lambda: find_alive(tree) == ["rank0", "rank1"])
    assert find_alive(tree) == ["rank0", "rank1"], "if this is [], update the module docstring"


def test_ranks_that_call_die_with_parent_always_end(start: Callable[..., Tree]) -> None:
    tree = start("setsid", "tied", shape="program")
    tree["supervisor"].kill()
    assert_all_end(tree)


def test_ranks_that_outlive_a_successful_launcher_are_ended(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("setsid", "leave")
    (tmp_path / "leave").touch()
    assert_all_end(tree)
    assert read_int(tmp_path / "code") == 0


@pytest.mark.parametrize("victim", ["outer caller", "outer supervisor", "supervisor"])
def test_kill_9_anywhere_in_nested_runs_ends_all(start: Callable[..., Tree], victim: str) -> None:
    tree = start("setsid", shape="run in run")
    tree[victim].kill()
    assert_all_end(tree)


def test_a_parent_that_died_before_the_check_is_detected(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    program = [sys.executable, supervise.__file__, f"--parent={gone.pid}"]
    done = subprocess.run([*program, "--", "sleep", "60"], check=False, timeout=10, cwd=tmp_path)
    assert done.returncode == 143
