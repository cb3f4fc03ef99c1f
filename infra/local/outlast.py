"""Run a Prefect module so that it survives outages of the server, and a flow run the end of its worker.

`python -m infra.local.outlast MODULE ...`

Prefect's clients give up on a request after a minute, or immediately if they never reached the server.
This ends the engine of a flow run and its worker, even after hours of work. Here requests are retried
until the server is back; SIGTERM still ends the process.

A worker reads the output of its runs from pipes, and Prefect's logger ends a process whose pipe is broken. So
the output of a run goes to the worker's log directly.
"""

import argparse
import asyncio
import logging
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidMessage

RETRY_SECONDS = 2.0
log = logging.getLogger("prefect.outlast")


def main() -> None:
    """Run the module given as the first argument, with the remaining arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.local.outlast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("module", choices=("prefect", "prefect.engine"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the module")
    arguments = parser.parse_args()
    if arguments.module == "prefect.engine":
        outlast_worker()
    outlast_outages()
    sys.argv = [arguments.module, *arguments.arguments]
    # Do not import `tasks` here: a flow run imports it from its own checkout.
    runpy.run_module(arguments.module, run_name="__main__", alter_sys=True)


def outlast_worker() -> None:
    """Let this process write to the log of the worker, if the worker belongs to a local stack."""
    log_file = Path(os.environ.get("NIGHTSHIFT_HOME", ""), "logs", "worker.log")
    if log_file.is_file():
        with log_file.open("ab") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())


def outlast_outages() -> None:
    """Make every Prefect client of this process retry while its server is unreachable."""
    outlast_requests()
    outlast_handshakes()


def outlast_handshakes() -> None:
    """Let Prefect's event streams retry if the server dies during a handshake.

    Prefect does not know websockets' InvalidMessage as an outage: its worker would report the run that
    it submits as crashed.
    """
    original = ClientConnection.handshake

    async def handshake(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            await original(self, *args, **kwargs)
        except InvalidMessage as err:
            raise ConnectionResetError(str(err)) from err

    setattr(ClientConnection, "handshake", handshake)  # noqa: B010 - replaces a method on purpose


def outlast_requests() -> None:
    """Retry requests while the server is unreachable."""
    original, original_async = PrefectHttpxSyncClient.send, PrefectHttpxAsyncClient.send
    outage = Outage()

    def send(self: Any, request: httpx.Request, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                answer = original(self, request, *args, **kwargs)
            except httpx.TransportError as err:
                outage.begin(err)
                time.sleep(RETRY_SECONDS)
            else:
                outage.end()
                return answer

    async def send_async(self: Any, request: httpx.Request, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                answer = await original_async(self, request, *args, **kwargs)
            except httpx.TransportError as err:
                outage.begin(err)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                outage.end()
                return answer

    setattr(PrefectHttpxSyncClient, "send", send)  # noqa: B010 - replaces a method on purpose
    setattr(PrefectHttpxAsyncClient, "send", send_async)  # noqa: B010 - replaces a method on purpose


class Outage:
    """Log once when the server becomes unreachable, and once when it is back."""

    def __init__(self) -> None:
        self.is_on = False

    def begin(self, err: httpx.TransportError) -> None:
        """Record a failed request."""
        if not self.is_on:
            self.is_on = True
            log.warning("the Prefect server is unreachable (%s: %s); retrying", type(err).__name__, err)

    def end(self) -> None:
        """Record a response."""
        if self.is_on:
            self.is_on = False
            log.info("the Prefect server is back")


if __name__ == "__main__":
    main()
