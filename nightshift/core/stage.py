"""What every program's `main()` shares: the command line, the exit protocol and the ledger entry.

Exit codes: 0 success, 1 a bug (traceback); others are errors that the user can act on, one line on stderr
(`nightshift.core.errors`). 2 is also the code of a command line that the program does not know. The flow
starts programs through DVC, and finds code and error in the file that NIGHTSHIFT_RESULT names.
"""

import argparse
import errno
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

# The disk is full, or nobody may write there.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# What keeps a program, and all that it starts, from the Hugging Face Hub; read when its client is imported.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Variable that names the file for the result of the next program.
RESULT = "NIGHTSHIFT_RESULT"
log = logging.getLogger(__name__)


def run_main(
    main: Callable[..., None],
    declare: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    is_online: bool = False,
) -> None:
    """Run a program: parse its command line, configure logging, turn a user's error into one line.

    `--help` and an argument that is not declared end the program before `main` starts, with exit code 0 or 2.

    Args:
        main: Gets each declared argument by its name.
        declare: Adds the program's arguments to its parser; None if it takes none, as a stage.
        is_online: It may ask the Hugging Face Hub, unless the user's HF_HUB_OFFLINE forbids it. No other
            program may, whoever starts it.
    """
    if not is_online:
        os.environ.update(OFFLINE)
    parser = build_parser(sys.modules[main.__module__])
    if declare:
        declare(parser)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    # What this program starts is not asked for its result.
    result_file = os.environ.pop(RESULT, None)
    error: PipelineError | None = None
    try:
        main(**arguments)
    except PipelineError as err:
        error = err
    except OSError as err:
        if err.errno not in NO_ROOM:
            raise
        error = StageError(f"{err}; make room there or give the rights to write, then run again")
    if result_file:
        result = {"code": error.exit_code, "error": str(error)} if error else {"code": 0, "error": None}
        Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    if error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def build_parser(program: ModuleType) -> argparse.ArgumentParser:
    """Build the parser of a program without arguments; its help is the docstring of the module."""
    spec = program.__spec__
    return argparse.ArgumentParser(
        # `python -m tasks.dedupe` runs `tasks.dedupe.__main__`.
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=program.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation that is accepted today has two meanings after the next argument.
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
    """Write `data/<stage>/summary.json`, the stage's entry in the ledger.

    It holds no clock and no path: equal inputs give equal bytes.

    Args:
        stage: Name of the stage.
        rows_in: Rows read.
        rows_out: Rows written.
        added: Rows made by the stage itself (paraphrases).
        dropped: Rows dropped, by reason; a reason without rows is left out.
        more: Further counts of the stage.

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
    """Pass on one line of a child's output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
