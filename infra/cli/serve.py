"""Serve a version, or an exported model, behind an OpenAI-compatible API until Ctrl-C."""

import asyncio
import contextlib
import errno
import logging
import socket
import warnings
from threading import Event, Thread

import uvicorn
from mlflow.exceptions import MlflowException
from transformers.utils.logging import disable_progress_bar

from infra.local.origin import LOOPBACK, with_origin_check
from infra.local.processes import port_holder
from infra.serving.api import build_app
from infra.serving.engine import Engine
from infra.serving.follow import Follower
from infra.serving.model import Served, is_export, load_address
from nightshift.core.errors import ConfigError, first_line
from nightshift.tracking.spool import limit_requests

# Time for running answers to end after Ctrl-C, seconds.
GRACE_SECONDS = 5
log = logging.getLogger(__name__)


def serve(address: str, host: str, port: int, seconds: float) -> None:
    """Load a model, then answer requests; an alias is followed when it moves.

    Args:
        address: Version address as for `find_model`, or the folder of an export.
        host: Address to listen on.
        port: Port to listen on.
        seconds: Time between two checks whether the alias moved.

    Raises:
        ConfigError: The port is taken, or the registry does not respond.
        GateError: The version does not exist, or its files differ from the registered ones.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    limit_requests()
    # The port is taken first: loading takes long. Clients that connect meanwhile wait.
    with listen(host, port) as listener:
        engine, stop = Engine(load(address)), Event()
        if is_alias(address):
            Thread(target=Follower(engine, address).run, args=(seconds, stop), daemon=True).start()
        log.info("serving %s at http://%s:%d/v1", engine.served.label, in_url(host), port)
        if in_url(host) not in LOOPBACK:
            log.warning("clients are not authenticated: whoever can reach this address can use the model")
        run(engine, listener, host)
        stop.set()
    log.info("stopped")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as err:
        reason = f"in use: {port_holder(port)}" if err.errno == errno.EADDRINUSE else err.strerror
        raise ConfigError(
            f"nightshift serve: cannot listen on {in_url(host)}:{port}: {reason}; "
            "choose another --port or --host"
        ) from err


def load(address: str) -> Served:
    """Load a model; the registry must respond.

    Raises:
        ConfigError: The registry does not respond.
    """
    try:
        return load_address(address)
    except MlflowException as err:
        raise ConfigError(
            f"registry: {first_line(err)}; start it with `nightshift up`, or set MLFLOW_TRACKING_URI"
        ) from err


def is_alias(address: str) -> bool:
    """Return whether an address can mean another version later.

    Example:
        >>> [is_alias(address) for address in ("champion", "models:/nightshift@champion", "7")]
        [True, True, False]
        >>> is_alias("models:/nightshift/7")
        False
    """
    return not is_export(address) and not address.rpartition("/")[2].isdigit()


def run(engine: Engine, listener: socket.socket, host: str) -> None:
    """Answer requests until Ctrl-C or SIGTERM; running answers have `GRACE_SECONDS` to end."""
    app = with_origin_check(build_app(engine), {*LOOPBACK, in_url(host)})
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    logging.getLogger("uvicorn.error").addFilter(is_no_cancellation)
    # uvicorn raises the signal again after its shutdown.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """Return whether a log record is anything but the traceback of an answer that the shutdown cut off."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def in_url(host: str) -> str:
    """Return a host as it appears in a URL and in the header Host."""
    return f"[{host}]" if ":" in host else host
