"""A process is identified by properties that neither clock changes nor reused pids affect."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nightshift.core.files import read_json, write_json
from nightshift.pipeline import leases
from tests.helpers.checkouts import ROOT


def test_a_clock_change_does_not_hide_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    held = leases.identify(os.getpid())
    created = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created + 3600)
    found = leases.find_process(held)
    assert found is not None
    assert found.pid == os.getpid()


@pytest.mark.parametrize(
    ("key", "value"), [("start_ticks", 1), ("boot_id", "of yesterday"), ("pid", 2**22 + 1)]
)
def test_a_reused_pid_is_another_process(key: str, value: object) -> None:
    assert leases.find_process({**leases.identify(os.getpid()), key: value}) is None


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as child:
        held = leases.identify(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert leases.find_process(held) is None


def test_the_start_is_read_for_names_with_brackets_and_spaces(tmp_path: Path) -> None:
    program = tmp_path / "a) (b c"
    program.symlink_to(sys.executable)
    code = "import sys; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([program, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        begun = psutil.Process(child.pid)._proc.create_time(monotonic=True)  # seconds since boot
        assert leases.start_ticks(child.pid) == round(begun * os.sysconf("SC_CLK_TCK"))


def test_a_lease_is_held_during_the_run_and_released_after_it(in_tmp: Path) -> None:
    assert leases.lease_holder("a-run") is None
    with leases.lease("a-run"):
        assert leases.lease_holder("a-run") == "alive"
        assert leases.leased_runs() == ["a-run"]
    assert leases.lease_holder("a-run") is None
    assert leases.leased_runs() == []


def test_a_damaged_lease_is_that_of_a_dead_run(in_tmp: Path) -> None:
    with leases.lease("a-run"):
        leases.lease_file("a-run").write_bytes(b"")
        assert leases.lease_holder("a-run") == "dead"
        assert leases.leased_runs() == ["a-run"]


def test_a_killed_run_leaves_its_lease_as_proof(in_tmp: Path) -> None:
    code = (
        "import os; from nightshift.pipeline.leases import lease; "
        "held = lease('a-run'); held.__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert leases.lease_holder("a-run") == "dead"


def test_a_lease_of_another_machine_proves_nothing(in_tmp: Path) -> None:
    with leases.lease("a-run"):
        file = leases.lease_file("a-run")
        write_json(file, {**read_json(file), "host": "elsewhere", "start_ticks": 1})
        assert leases.lease_holder("a-run") == "elsewhere"
