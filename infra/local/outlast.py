"""Run a module of Prefect so that it outlasts an outage of the server.

`python -m infra.local.outlast MODULE ...`

Prefect's clients give up a request after a minute, and at once if they never reached the server before. For
the engine of a flow run and for the worker above it that is the end, whatever hours of work they have done.
Here a request asks again until the server is back; SIGTERM still ends the process.
"""

import argparse
import asyncio
import logging
import runpy
import sys
import time
from typing import Any

import httpx
from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient

RETRY_SECONDS = 2.0
log = logging.getLogger("prefect.outlast")


def main() -> None:
    """Run the module that the first argument names, with the others as its own."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.local.outlast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("module", choices=("prefect", "prefect.engine"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module")
    told = parser.parse_args()
    outlast_outages()
    sys.argv = [told.module, *told.arguments]
    # Nothing of `tasks` is imported here: a flow run imports its own checkout's.
    runpy.run_module(told.module, run_name="__main__", alter_sys=True)


def outlast_outages() -> None:
    """Let every Prefect client of this process ask again for as long as its server is away."""
    ask, ask_async = PrefectHttpxSyncClient.send, PrefectHttpxAsyncClient.send
    outage = Outage()

    def send(self: Any, request: httpx.Request, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                answer = ask(self, request, *args, **kwargs)
            except httpx.TransportError as err:
                outage.begin(err)
                time.sleep(RETRY_SECONDS)
            else:
                outage.end()
                return answer

    async def send_async(self: Any, request: httpx.Request, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                answer = await ask_async(self, request, *args, **kwargs)
            except httpx.TransportError as err:
                outage.begin(err)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                outage.end()
                return answer

    setattr(PrefectHttpxSyncClient, "send", send)  # noqa: B010 - replacing a method is the point
    setattr(PrefectHttpxAsyncClient, "send", send_async)  # noqa: B010 - replacing a method is the point


class Outage:
    """Says once that the server went away, and once that it is back."""

    def __init__(self) -> None:
        self.is_on = False

    def begin(self, err: httpx.TransportError) -> None:
        """Take note of a request that failed."""
        if not self.is_on:
            self.is_on = True
            log.warning("the Prefect server is away (%s: %s); waiting for it", type(err).__name__, err)

    def end(self) -> None:
        """Take note of an answer."""
        if self.is_on:
            self.is_on = False
            log.info("the Prefect server is back")


if __name__ == "__main__":
    main()
