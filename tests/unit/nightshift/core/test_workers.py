"""Work done by several processes: the same results in order, and no process is left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.core import workers
from nightshift.core.errors import DataError, StageError
from nightshift.core.workers import Work, start_workers
from tests.helpers.checkouts import ROOT

# A background shell ignores SIGINT, and the stage would inherit that.
SCRIPT = """
import signal
import time
from contextlib import nullcontext
from functools import partial
from nightshift.core.workers import start_workers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with start_workers("x", partial(nullcontext, iter), is_large=True, batch=1) as work:
        list(work([1]))
        print("ready", flush=True)
        time.sleep(60)
"""


def spell(numbers: Iterable[int]) -> Iterator[tuple[str, bool]]:
    """Spell numbers, and return whether this is a worker."""
    return ((str(number), workers._works != []) for number in numbers)


def fail(numbers: Iterable[int]) -> Iterator[int]:
    """Fail for the number 2."""
    for number in numbers:
        if number == 2:
            raise DataError(f"a.jsonl:{number}: bad")
        yield number


def end(_: Iterable[int]) -> Iterator[int]:
    """End this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return iter(())


@pytest.fixture(scope="module")
def many() -> Iterator[Work[int, tuple[str, bool]]]:
    with start_workers("x", partial(nullcontext, spell), is_large=True, batch=3) as work:
        yield work


@settings(deadline=None)
@given(numbers=st.lists(st.integers(), max_size=40))
def test_several_processes_give_the_same_results_in_order(
    many: Work[int, tuple[str, bool]], numbers: list[int]
) -> None:
    assert list(many(numbers)) == [(str(number), True) for number in numbers]


def test_little_work_starts_no_process() -> None:
    with start_workers("x", partial(nullcontext, spell), is_large=False, batch=1) as work:
        assert list(work([1, 2])) == [("1", False), ("2", False)]


def test_few_batches_are_read_ahead(many: Work[int, object]) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            read.append(number)
            yield number

    next(many(numbers()))
    assert len(read) == 3 * (2 * (os.cpu_count() or 1) + 1)


def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    with (
        pytest.raises(DataError, match="jsonl:2: bad"),
        start_workers("x", partial(nullcontext, fail), is_large=True, batch=1) as work,
    ):
        list(work([1, 2]))


def test_a_killed_worker_is_one_error() -> None:
    with (
        pytest.raises(StageError, match="x: a worker process was killed"),
        start_workers("x", partial(nullcontext, end), is_large=True, batch=1) as work,
    ):
        list(work([1]))


def start_script(folder: Path) -> "tuple[subprocess.Popen[bytes], list[psutil.Process]]":
    """Start a stage that waits with its workers; return it and its child processes."""
    script = folder / "stage.py"
    script.write_text(SCRIPT)
    stage = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        start_new_session=True,
    )
    assert stage.stdout
    assert stage.stdout.readline() == b"ready\n"
    return stage, psutil.Process(stage.pid).children()


def test_the_workers_end_with_a_stage_that_is_killed(tmp_path: Path) -> None:
    stage, processes = start_script(tmp_path)
    stage.kill()
    stage.communicate()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    assert processes


def test_ctrl_c_ends_the_stage_and_its_workers_with_one_traceback(tmp_path: Path) -> None:
    stage, processes = start_script(tmp_path)
    os.killpg(stage.pid, signal.SIGINT)
    _, errors = stage.communicate(timeout=30)
    assert errors.count(b"Traceback") == 1
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
