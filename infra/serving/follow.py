"""Follow an alias: when it moves to another version, that version takes over.

Nothing here may stop serving. A registry that does not respond is reported once and asked again; a
version that does not load is reported, and the served one stays.
"""

import logging
import time
from threading import Event
from typing import Any

from infra.serving.engine import Engine
from nightshift.core.errors import first_line
from nightshift.registry.versions import find_model, open_model

# Wait before a version that did not load is tried again: loading takes long, and memory.
RETRY_SECONDS = 600.0
log = logging.getLogger(__name__)


class Follower:
    """Keeps the served version equal to the version with an address."""

    def __init__(self, engine: Engine, address: str) -> None:
        self.engine, self.address = engine, address
        self.is_down = False
        self.failed, self.retry_at = "", 0.0

    def run(self, seconds: float, stop: Event) -> None:
        """Check every `seconds`, until `stop` is set."""
        while not stop.wait(seconds):
            self.check()

    def check(self) -> None:
        """Ask the registry once, and replace the served version if it is no longer the right one."""
        version = self.find()
        if version is None or int(version.version) == self.engine.served.version:
            return
        if version.version == self.failed and time.monotonic() < self.retry_at:
            return
        self.replace(version)

    def find(self) -> Any | None:
        """Return the version with the address; None, with one warning, while it cannot be found."""
        try:
            version = find_model(self.address)
        # Any error: asking must never stop serving.
        except Exception as err:  # noqa: BLE001
            if not self.is_down:
                label = self.engine.served.label
                log.warning(
                    "%s keeps serving, %s is looked up again: %s", label, self.address, first_line(err)
                )
            self.is_down = True
            return None
        if self.is_down:
            log.info("registry: %s found again", self.address)
        self.is_down = False
        return version

    def replace(self, version: Any) -> None:
        """Verify and load a version; the served one stays if that fails."""
        before, after = self.engine.served.label, f"{version.name}@{version.version}"
        log.info("%s: now version %s; loading it", self.address, version.version)
        try:
            with open_model(version) as folders:
                self.engine.replace(version, *folders)
        # Any error: a broken version must never stop serving.
        except Exception as err:  # noqa: BLE001
            log.error("%s keeps serving, %s does not load: %s", before, after, first_line(err))
            self.failed, self.retry_at = version.version, time.monotonic() + RETRY_SECONDS
        else:
            log.info("%s took over from %s", after, before)
        self.engine.release()
