"""Start the services of the local stack again when they end without `nightshift down`.

It runs beside them. Its own end leaves them running; the next `nightshift up` starts it again.
"""

import logging
import os
import sys
import time
from contextlib import suppress

from infra.local import processes, stack
from nightshift.core.errors import PipelineError
from nightshift.core.stage import build_parser
from nightshift.core.state import state_dir

CHECK_SECONDS = 2.0
# Longest pause if a service ends repeatedly, as on a full disk.
PAUSE_SECONDS = 60.0
log = logging.getLogger(__name__)


def main() -> None:
    """Check the services until SIGTERM, or until `nightshift down` has ended them."""
    build_parser(sys.modules[__name__]).parse_args()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d | %(levelname)s | %(message)s", datefmt="%H:%M:%S")
    pause = CHECK_SECONDS
    while processes.read_records(state_dir()):
        try:
            is_calm = not stack.restart_lost()
        except (PipelineError, OSError) as err:
            log.error("%s; next try in %d s", err, pause)
            is_calm = False
        # Those it has started are its children.
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        pause = CHECK_SECONDS if is_calm else pause
        time.sleep(pause)
        pause = pause if is_calm else min(2 * pause, PAUSE_SECONDS)


if __name__ == "__main__":
    main()
