"""The address that `nightshift serve` listens on."""

import os
import socket

import pytest

from infra.cli import serve
from nightshift.core.errors import ConfigError


def test_a_taken_port_is_reported_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: in use: pid {os.getpid()} "
        ):
            serve.listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:8000: .+; choose another --port or --host"):
        serve.listen("192.0.2.1", 8000)
    with pytest.raises(ConfigError, match=r"nowhere\.invalid:8000: .+; choose another --port or --host"):
        serve.listen("nowhere.invalid", 8000)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_accepted() -> None:
    with serve.listen("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"
    assert serve.in_url("::1") == "[::1]"
