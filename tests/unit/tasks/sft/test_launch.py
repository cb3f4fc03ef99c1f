"""The ranks' command line on one and on several machines, and the environment variables it requires."""

import base64
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.errors import ConfigError
from tasks.sft.launch import build_command, node_rank, rank_environment, rendezvous
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import make_job, sft_params

SEVERAL = {"strategy": "zero2", "num_processes": 16, "hostfile": "hosts"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def world(command: Sequence[str]) -> Any:
    """Return the devices of each machine as passed to DeepSpeed's launcher."""
    return json.loads(base64.urlsafe_b64decode(command[4].partition("=")[2]))


def test_one_machine_uses_the_loopback_interface() -> None:
    params = sft_params(num_processes=2)
    address, port = rendezvous(params)
    assert address == "127.0.0.1"
    command = build_command(make_job(params, strategy="zero2", num_processes=2), address, port)
    assert world(command) == {"localhost": [0, 1]}
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert command[5:] == [
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--no_local_rank",
        "--module",
        "tasks.sft.worker",
    ]


def test_with_a_hostfile_deepspeed_uses_ssh_and_finds_the_address() -> None:
    params = sft_params(**SEVERAL)
    address, port = rendezvous(params)
    assert build_command(make_job(params, strategy="zero2", num_processes=2), address, port)[1:3] == [
        "--hostfile=hosts",
        f"--master_port={port}",
    ]


def test_with_a_node_rank_each_machine_starts_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NODE_RANK": "3", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    params = sft_params(**SEVERAL)
    assert build_command(make_job(params, strategy="zero2"), *rendezvous(params))[1:6] == [
        "--hostfile=hosts",
        "--no_ssh",
        "--node_rank=3",
        "--master_addr=10.0.0.7",
        "--master_port=29500",
    ]


def test_missing_environment_variables_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(ConfigError, match=r"NODE_RANK=1, but sft\.hostfile is null"):
        node_rank(sft_params())
    with pytest.raises(ConfigError, match=r"cannot meet at MASTER_ADDR='', MASTER_PORT=''"):
        rendezvous(sft_params(**SEVERAL))
    monkeypatch.setenv("NODE_RANK", "second")
    with pytest.raises(ConfigError, match="NODE_RANK=second is not an index"):
        node_rank(sft_params(**SEVERAL))


@pytest.mark.parametrize("devices", [("3",), ("2", "5"), ("GPU-8932f937", "MIG-41b1")])
def test_the_ranks_see_only_the_visible_devices(devices: tuple[str, ...], tmp_path: Path) -> None:
    """DeepSpeed's `--num_gpus` would take the machine's first GPUs, even if others use them."""
    command = build_command(make_job(sft_params(), strategy="zero2", devices=devices), "127.0.0.1", 29500)
    assert world(command) == {"localhost": list(devices)}
    # Instead of the module, run a program that writes its visible devices.
    launch = [*command[: command.index("--module")], "--no_python"]
    script = 'echo "$CUDA_VISIBLE_DEVICES" > "$0/$RANK"'
    subprocess.run([*launch, "sh", "-c", script, str(tmp_path)], check=True)
    seen = [path.read_text().strip() for path in sorted(tmp_path.iterdir())]
    assert seen == [",".join(devices)] * len(devices)


def test_one_process_sees_one_device() -> None:
    assert build_command(make_job(sft_params(), devices=("3",)), "", 0)[1:] == ["-m", "tasks.sft.worker"]
    assert rank_environment("cuda", ["3"])["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_ranks_keep_the_python_path_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/opt/mine:/opt/more")
    own, *others = rank_environment("cpu", [])["PYTHONPATH"].split(":")
    assert own == str(ROOT)
    assert others == ["/opt/mine", "/opt/more"]
    monkeypatch.delenv("PYTHONPATH")
    assert rank_environment("cpu", [])["PYTHONPATH"] == str(ROOT)


def test_the_user_can_configure_the_gpu_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert rank_environment("cuda", ["0"])["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    # The older name works too; torch reads it only if the newer one is unset.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert rank_environment("cuda", ["0"])["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:32")
    assert rank_environment("cuda", ["0"])["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:32"
