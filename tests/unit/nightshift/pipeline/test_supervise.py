"""Output and exit codes of `run`; which processes it kills: integration/test_process_tree.py."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nightshift.core.errors import StageError
from nightshift.pipeline import supervise
from nightshift.pipeline.supervise import run

pytestmark = pytest.mark.timeout(30)


def run_shell(script: str, *, grace_seconds: float = 5.0) -> tuple[int, list[str]]:
    """Run a shell script and return its exit code and output lines."""
    lines: list[str] = []
    code = run(["sh", "-c", script], on_line=lines.append, grace_seconds=grace_seconds)
    return code, lines


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_output_is_streamed_while_the_command_runs(tmp_path: Path) -> None:
    go = tmp_path / "go"
    lines: list[str] = []

    def answer(line: str) -> None:
        lines.append(line)
        go.touch()

    # The command waits for a reaction to its first line, so without streaming it never ends.
    script = f"echo ready; while [ ! -e {go} ]; do sleep 0.05; done; echo done"
    assert run(["sh", "-c", script], on_line=answer) == 0
    assert lines == ["ready", "done"]


def test_output_of_python_is_not_buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    script = "import time; print('step 1'); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-S", "-c", script], on_line=stop)
    assert lines == ["step 1"]


def test_stdout_and_stderr_arrive_in_order() -> None:
    assert run_shell("echo one; echo two >&2; echo three") == (0, ["one", "two", "three"])


def test_a_carriage_return_ends_a_line_and_blank_lines_are_skipped() -> None:
    script = r"printf '\r 10%%\r 50%%\r100%%\r\n\n  \nend\r\n'"
    assert run_shell(script) == (0, [" 10%", " 50%", "100%", "end"])


def test_the_last_line_needs_no_newline() -> None:
    assert run_shell("printf 'no newline'") == (0, ["no newline"])


def test_output_written_while_on_line_is_busy_still_arrives() -> None:
    lines: list[str] = []

    def be_slow(line: str) -> None:
        lines.append(line)
        time.sleep(0.7 if line == "one" else 0.0)

    assert run(["sh", "-c", "echo one; sleep 0.1; echo two"], on_line=be_slow) == 0
    assert lines == ["one", "two"]


def test_invalid_utf8_is_replaced() -> None:
    assert run_shell(r"printf 'a\377b\n'") == (0, ["a\ufffdb"])


def test_a_character_split_between_two_writes_is_decoded() -> None:
    assert run_shell(r"printf 'caf\303'; sleep 0.2; printf '\251\n'") == (0, ["café"])


def test_output_larger_than_the_pipe_arrives_completely() -> None:
    code, lines = run_shell("seq 100000")
    assert (code, len(lines), lines[-1]) == (0, 100_000, "100000")


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 75", 75), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_the_exit_code_is_the_commands_or_128_plus_its_signal(script: str, code: int) -> None:
    assert run_shell(script) == (code, [])


def test_a_missing_program_is_an_error_with_a_remedy() -> None:
    with pytest.raises(StageError, match=r"^no-such-program: not found on PATH; install it"):
        run(["no-such-program"], on_line=print)


def test_a_program_is_searched_on_the_path_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^sh: not found on PATH"):
        run(["sh", "-c", "exit 0"], on_line=print, env={"PATH": str(tmp_path)})


def test_a_program_that_cannot_start_returns_127_with_one_line(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    lines: list[str] = []
    assert run([str(program)], on_line=lines.append) == 127
    assert lines == [f"supervise: {program}: cannot be started: No such file or directory"]


def test_arguments_reach_the_command_without_a_shell() -> None:
    lines: list[str] = []
    assert run(["printf", "%s\n", "$HOME; exit 3", "--", "--grace"], on_line=lines.append) == 0
    assert lines == ["$HOME; exit 3", "--", "--grace"]


def test_stdin_of_the_command_is_empty() -> None:
    reader, writer = os.pipe()
    own = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert run_shell("cat; echo end") == (0, ["end"])
    finally:
        os.dup2(own, 0)
        for descriptor in (own, reader, writer):
            os.close(descriptor)


def test_env_extends_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.setenv("CHANGED", "old")
    lines: list[str] = []
    run(["sh", "-c", "echo $KEPT $CHANGED"], on_line=lines.append, env={"CHANGED": "new"})
    assert lines == ["old new"]


def test_the_working_directory_may_contain_a_package_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nightshift", "psutil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    monkeypatch.chdir(tmp_path)
    assert run_shell("pwd") == (0, [str(tmp_path)])


def test_an_error_in_on_line_ends_the_tree_and_is_raised() -> None:
    lines: list[str] = []

    def fail(line: str) -> None:
        lines.append(line)
        raise ValueError("log is full")

    script = "trap 'echo saved; exit 0' TERM; setsid sleep 60 & echo $$ $!; wait"
    with pytest.raises(ValueError, match="log is full"):
        run(["sh", "-c", script], on_line=fail)
    assert len(lines) == 1, "a broken on_line is not called again"
    assert [pid for pid in map(int, lines[0].split()) if is_alive(pid)] == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_output_during_the_grace_period_arrives(stop: type[BaseException]) -> None:
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if line == "ready":
            raise stop

    script = "trap 'echo checkpoint saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    with pytest.raises(stop):
        run(["sh", "-c", script], on_line=interrupt)
    # Between the two lines the shell may report that its `sleep` was terminated.
    assert (lines[0], lines[-1]) == ("ready", "checkpoint saved")


def test_a_process_gets_sigterm_even_if_its_parent_survives() -> None:
    def interrupt(line: str) -> None:
        lines.append(line)
        if line == "ready":
            raise KeyboardInterrupt

    lines: list[str] = []
    rank = "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", 'trap : TERM; sh -c "$1"', "sh", rank], on_line=interrupt)
    assert "saved" in lines


def test_a_process_started_in_the_grace_period_may_finish() -> None:
    def interrupt(line: str) -> None:
        lines.append(line)
        if line == "ready":
            raise KeyboardInterrupt

    lines: list[str] = []
    upload = "sh -c 'sleep 0.5; echo uploaded'"
    script = f'trap "{upload}; exit 75" TERM; echo ready; while :; do sleep 0.05; done'
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", script], on_line=interrupt)
    assert (lines[0], lines[-1]) == ("ready", "uploaded")


def test_a_process_that_outlives_its_command_is_ended_and_reported() -> None:
    code, lines = run_shell("setsid sleep 61 & echo $!")
    assert code == 0
    assert lines[1:] == [f"supervise: pid {lines[0]} (sleep 61) outlived its command; ended"]
    assert not is_alive(int(lines[0]))


def test_a_command_that_kills_its_own_group_does_not_kill_the_supervisor() -> None:
    # Only a live supervisor can report the sleep process.
    code, lines = run_shell("setsid sleep 63 & echo $!; sleep 0.2; kill -9 0")
    assert code == 137
    assert lines[1:] == [f"supervise: pid {lines[0]} (sleep 63) outlived its command; ended"]


def test_a_helper_that_exits_shortly_after_the_command_is_not_reported() -> None:
    assert run_shell("sleep 0.2 & exit 0") == (0, [])


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period() -> None:
    start = time.monotonic()
    code, lines = run_shell("trap '' TERM; setsid sleep 62 & echo $!", grace_seconds=0.3)
    assert time.monotonic() - start < 5
    assert code == 0
    assert lines[1:] == [
        f"supervise: pid {lines[0]} (sleep 62) outlived its command; ended",
        f"supervise: pid {lines[0]} (sleep 62) did not end within its grace period; killed",
    ]
    assert not is_alive(int(lines[0]))


def test_concurrent_runs_end_only_their_own_trees() -> None:
    results: dict[str, tuple[int, list[str]]] = {}

    def work(name: str, script: str) -> None:
        results[name] = run_shell(script)

    scripts = {"short": "echo a; exit 1", "long": "sleep 0.8; echo b; exit 2"}
    threads = [threading.Thread(target=work, args=item) for item in scripts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"short": (1, ["a"]), "long": (2, ["b"])}


def test_the_program_requires_a_command() -> None:
    done = subprocess.run(
        [sys.executable, supervise.__file__, "--grace", "1", "--"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no command after --" in done.stderr
