"""Shared by every program's `main()`: command line, exit codes and row ledger entry.

Exit codes: 0 success, 1 a bug (traceback); other codes are errors that the user can fix, one line on
stderr (`nightshift.core.errors`). 2 is also the code for invalid arguments. The flow starts programs
through DVC and reads exit code and error from the file in NIGHTSHIFT_RESULT.
"""

import argparse
import errno
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from nightshift.core.errors import PipelineError, StageError
from nightshift.core.files import write_figures
from nightshift.core.paths import DATA

# The disk is full or not writable.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# Keeps a program and its child processes off the Hugging Face Hub; huggingface_hub reads it on import.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Environment variable with the path of the next program's result file.
RESULT = "NIGHTSHIFT_RESULT"
log = logging.getLogger(__name__)


def run_main(
    main: Callable[..., None],
    declare: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    is_online: bool = False,
    has_many_objects: bool = False,
) -> None:
    """Run a program: parse arguments, configure logging, print user errors as one line.

    `--help` and undeclared arguments end the program before `main` starts, with exit code 0 or 2.

    Args:
        main: Function that receives each declared argument by name.
        declare: Function that adds the program's arguments to the parser; None if there are none.
        is_online: Whether the program may access the Hugging Face Hub, unless the user sets
            HF_HUB_OFFLINE. All other programs run offline, whatever starts them.
        has_many_objects: Whether it keeps an object per row; see `collect_rarely`.
    """
    if not is_online:
        os.environ.update(OFFLINE)
    if has_many_objects:
        collect_rarely()
    parser = build_parser(sys.modules[main.__module__])
    if declare:
        declare(parser)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    # The program's own lines name it instead of `__main__`.
    logging.getLogger("__main__").name = parser.prog.removeprefix("python -m ")
    # Child processes must not write this program's result file.
    result_file = os.environ.pop(RESULT, None)
    error: PipelineError | None = None
    try:
        main(**arguments)
    except (PipelineError, OSError) as err:
        error = explain(err)
    if result_file:
        result = {"code": error.exit_code, "error": str(error)} if error else {"code": 0, "error": None}
        Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    if error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def skip_bitsandbytes() -> None:
    """Keep PEFT from importing bitsandbytes, which takes a second; no base is quantized."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def collect_rarely() -> None:
    """Look for reference cycles after 50,000 new objects instead of 700, and seldom among old ones.

    Rows have no cycles. To look for them among millions of rows takes up to a third of a stage's time.
    """
    gc.set_threshold(50_000, 20, 100)


def explain(err: PipelineError | OSError) -> PipelineError:
    """Return the error to report: the given one, or one about the disk.

    Raises:
        OSError: The error is not about the disk, so it is a bug.
    """
    if isinstance(err, PipelineError):
        return err
    if err.errno not in DISK_ERRORS:
        raise err
    return StageError(f"{err}; free disk space or fix the permissions, then run again")


def build_parser(program: ModuleType) -> argparse.ArgumentParser:
    """Build a program's parser without arguments; the module docstring is its help text."""
    spec = program.__spec__
    return argparse.ArgumentParser(
        # `python -m tasks.dedupe` runs `tasks.dedupe.__main__`.
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=program.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation becomes ambiguous when another argument is added.
        allow_abbrev=False,
    )


def write_summary(
    stage: str,
    *,
    rows_in: int,
    rows_out: int,
    added: int = 0,
    dropped: Mapping[str, int] | None = None,
    **more: Any,
) -> None:
    """Write `data/<stage>/summary.json`, the stage's entry in the row ledger.

    It contains no timestamps and no paths: equal inputs give identical bytes.

    Args:
        stage: Stage name.
        rows_in: Number of rows read.
        rows_out: Number of rows written.
        added: Number of rows created by the stage (paraphrases).
        dropped: Number of rows dropped, by reason; zero counts are omitted.
        more: Additional counts of the stage.

    Raises:
        StageError: The entry does not balance: rows_in + added != rows_out + dropped.
    """
    reasons = {reason: count for reason, count in sorted((dropped or {}).items()) if count}
    if rows_in + added != rows_out + sum(reasons.values()):
        raise StageError(
            f"{stage}: the ledger does not balance: {rows_in} in + {added} added != {rows_out} out "
            f"+ {reasons} dropped; this is a bug in the stage, report it"
        )
    entry = {"rows_in": rows_in, "added": added, "rows_out": rows_out, "dropped": reasons, **more}
    write_figures(DATA / stage / "summary.json", entry)
    log.info("%s: %d in, %d added, %d out, dropped %s", stage, rows_in, added, rows_out, reasons)


def print_line(line: str) -> None:
    """Print one line of a child process's output and flush."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
