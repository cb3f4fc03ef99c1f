"""Print the output of the ranks line by line, with a progress bar below it in a terminal."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from nightshift.core.stage import print_line

STEP = re.compile(r"\bstep (\d+)/(\d+) (.*)")


@contextmanager
def line_printer() -> Iterator[Callable[[str], None]]:
    """Yield a function that prints one line of the ranks.

    In a terminal, the line `step 3/10 loss ...` updates a progress bar with these figures, and all other
    lines scroll above it. Elsewhere (a pipe, the flow, a file) every line is passed on unchanged.
    """
    if not sys.stdout.isatty():
        yield print_line
        return
    columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(20), TaskProgressColumn())
    figures = TextColumn("{task.fields[figures]}", markup=False)
    console = Console(highlight=False, soft_wrap=True)
    with Progress(*columns, figures, console=console) as progress:
        bar = progress.add_task("training", total=None, figures="", visible=False)

        def show(line: str) -> None:
            found = STEP.search(line)
            if not found:
                console.print(Text(line))
            elif found[3].startswith("eval_loss"):
                console.print(Text(line[found.start() :]))
            else:
                completed, total = int(found[1]), int(found[2])
                progress.update(bar, completed=completed, total=total, figures=found[3], visible=True)

        yield show
