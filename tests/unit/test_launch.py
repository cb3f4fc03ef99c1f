"""The ranks' command line, on one machine and on several, and what the environment has to say for that."""

import pytest

from tasks.errors import ConfigError
from tasks.sft.launch import launcher, node_rank, rendezvous
from tests.sft import sft_params

SEVERAL = {"strategy": "zero2", "num_processes": 16, "hostfile": "hosts"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_machine_meets_itself_on_the_loopback_interface() -> None:
    params = sft_params(num_processes=2)
    address, port = rendezvous(params)
    assert address == "127.0.0.1"
    assert launcher(params, "zero2", address, port)[1:] == [
        "--num_gpus=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--no_local_rank",
        "--module",
        "tasks.sft.worker",
    ]


def test_with_a_hostfile_deepspeed_reaches_the_machines_by_ssh_and_finds_the_address() -> None:
    params = sft_params(**SEVERAL)
    address, port = rendezvous(params)
    assert launcher(params, "zero2", address, port)[1:3] == ["--hostfile=hosts", f"--master_port={port}"]


def test_with_a_node_rank_each_machine_starts_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NODE_RANK": "3", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    params = sft_params(**SEVERAL)
    assert launcher(params, "zero2", *rendezvous(params))[1:6] == [
        "--hostfile=hosts",
        "--no_ssh",
        "--node_rank=3",
        "--master_addr=10.0.0.7",
        "--master_port=29500",
    ]


def test_what_the_environment_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(ConfigError, match=r"NODE_RANK=1, but sft\.hostfile is null"):
        node_rank(sft_params())
    with pytest.raises(ConfigError, match=r"cannot meet at MASTER_ADDR='', MASTER_PORT=''"):
        rendezvous(sft_params(**SEVERAL))
    monkeypatch.setenv("NODE_RANK", "second")
    with pytest.raises(ConfigError, match="NODE_RANK=second is no number"):
        node_rank(sft_params(**SEVERAL))
