"""Work on a stream of items in several processes, if there is much of it.

To start a process takes about a second, so a small amount of work is done in the process that has it.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

from nightshift.core.errors import StageError
from nightshift.core.stage import collect_rarely

Item = TypeVar("Item")
Result = TypeVar("Result")
# Yields one result for each item, in order.
Work = Callable[[Iterable[Item]], Iterator[Result]]
# Opens what the work needs, once in each process. Other processes get a copy, so it must be picklable.
Start = Callable[[], AbstractContextManager[Work[Item, Result]]]

# The work of this process, if it is a worker, and what it has open until the process ends.
_works: list[Work[Any, Any]] = []
_opened = ExitStack()


@contextmanager
def start_workers(
    stage: str, start: Start[Item, Result], *, is_large: bool, batch: int
) -> Iterator[Work[Item, Result]]:
    """Yield the work: done on all CPU cores if it is large, in this process otherwise.

    The processes end with this one, even if it is killed. Two batches per core and one are in memory.

    Args:
        stage: Name of the stage, for the error.
        start: Starts the work in a process.
        is_large: Whether the work takes longer than to start the processes.
        batch: Items that a process works on at once.

    Raises:
        StageError: A process was killed, or did not start.
    """
    if not is_large:
        with start() as work:
            yield work
        return
    count = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (start,)) as pool:
        _start_processes(pool, count)

        def work_on_all_cores(items: Iterable[Item]) -> Iterator[Result]:
            remaining = iter(items)
            pending: deque[Future[list[Result]]] = deque()
            while some := list(islice(remaining, batch)):
                pending.append(pool.submit(_work_on, some))
                if len(pending) > 2 * count:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()

        try:
            yield work_on_all_cores
        except BrokenProcessPool:
            raise StageError(
                f"{stage}: a worker process was killed, or did not start (its error is above); free memory "
                "if it was full, and run it again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_processes(pool: ProcessPoolExecutor, count: int) -> None:
    """Start the processes before they get work. They ignore Ctrl-C, which reaches all: this one ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(count):
            pool.submit(int)
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(start: Start[Any, Any]) -> None:
    """Prepare this process, which uses one CPU core and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    collect_rarely()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _works.append(_opened.enter_context(start()))


def _end_with_parent() -> None:
    """Wait until the parent ends, even if it is killed; then end this process."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work_on(items: list[Any]) -> list[Any]:
    """Work on a batch of items in a worker."""
    return list(_works[0](items))
