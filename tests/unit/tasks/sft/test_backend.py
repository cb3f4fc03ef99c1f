"""Missing capabilities are reported before any run; devices and processes are chosen in one place."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.errors import ConfigError
from tasks.sft import SftParams, backend
from tasks.sft.backend import choose_backend, read_hostfile, with_processes
from tasks.sft.machine import Machine
from tasks.sft.memory import Batch
from tasks.sft.strategy import GIB
from tests.helpers.sft import sft_params
from tests.unit.tasks.sft.test_memory import LLAMA3_8B

CPU = Machine("cpu", (), None, "fp32", "sdpa", "lm_head", has_liger=False)
TWO_GPUS = Machine("cuda", ("2", "5"), 79 * GIB, "bf16", "sdpa", "lm_head", has_liger=False)


def ranks(gpus: int, **changes: Any) -> int:
    return with_processes(sft_params(**changes), gpus).ranks


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_auto_is_one_process_per_visible_gpu() -> None:
    assert [ranks(gpus, num_processes="auto") for gpus in (1, 2, 8)] == [1, 2, 8]
    assert ranks(8, num_processes="auto", strategy="single") == 1


@pytest.mark.parametrize(("memory", "processes"), [(24 * GIB, 2), (4 * GIB, 2), (4 * GIB - 1, 1)])
def test_on_a_cpu_auto_is_two_processes_if_memory_allows(
    memory: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "available_memory", lambda: memory)
    assert ranks(0, num_processes="auto") == processes
    assert ranks(0, num_processes=7) == 7


def test_more_processes_than_gpus_are_rejected_before_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        ranks(1, num_processes=2)
    assert str(caught.value) == (
        "params.yaml: sft.num_processes=2, but this machine has 1 GPUs; set auto, or 1"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(ConfigError, match=r"num_processes=8, but CUDA_VISIBLE_DEVICES=3,4 has 2 GPUs"):
        ranks(2, num_processes=8)


def test_fewer_processes_use_the_first_visible_gpus() -> None:
    params = with_processes(sft_params(num_processes=1, strategy="zero2"), 2)
    assert choose_backend(params, TWO_GPUS).devices == ("2",)
    both = with_processes(sft_params(num_processes="auto", strategy="zero2"), 2)
    assert choose_backend(both, TWO_GPUS).devices == ("2", "5")


def test_a_hostfile_determines_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nfirst slots=8\n\nsecond  slots = 4 # half\n")
    assert read_hostfile(hosts) == {"first": 8, "second": 4}
    assert ranks(8, num_processes="auto", hostfile=str(hosts)) == 12
    assert ranks(8, num_processes=12, hostfile=str(hosts)) == 12
    with pytest.raises(ConfigError, match=r"num_processes=16, but .*hosts has 12 slots; set auto"):
        ranks(8, num_processes=16, hostfile=str(hosts))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert ranks(3, num_processes="auto", hostfile=str(hosts)) == 12
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=4,5, but DeepSpeed takes the first GPUs"):
        ranks(2, num_processes="auto", hostfile=str(hosts))


@pytest.mark.parametrize("text", ["first", "first slots=", "first slots=2\nfirst slots=2"])
def test_a_hostfile_that_deepspeed_cannot_read_is_rejected(text: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    with pytest.raises(ConfigError, match=r"hosts:\d: 'first.*': must be `name slots=n`"):
        read_hostfile(hosts)
    with pytest.raises(ConfigError, match=re.escape(f"sft.hostfile={tmp_path}/none: not found")):
        read_hostfile(tmp_path / "none")


def choice(machine: Machine, config: Mapping[str, Any] | None = None, **changes: Any) -> tuple[str, str]:
    params: SftParams = with_processes(sft_params(**changes), len(machine.devices))
    found = choose_backend(params, machine, config, Batch(4096, 2048))
    return found.strategy, found.reason


def test_auto_chooses_the_simplest_strategy() -> None:
    several = "2 processes, each with the whole model"
    assert choice(CPU, strategy="auto") == ("ddp", several)
    assert choice(CPU, strategy="auto", num_processes=1) == ("single", "one process")
    assert choice(TWO_GPUS, LLAMA3_8B, strategy="auto", num_processes="auto")[0] == "ddp"


def test_ddp_with_one_process_becomes_single_and_the_reason_is_given() -> None:
    expected = ("single", "ddp with one process is single")
    assert choice(CPU, strategy="ddp", num_processes=1) == expected
    one_gpu = Machine("cuda", ("0",), 79 * GIB, "bf16", "sdpa", "lm_head", has_liger=False)
    assert choice(one_gpu, strategy="ddp", num_processes="auto") == expected


def test_auto_considers_free_memory_only() -> None:
    busy = Machine("cuda", ("0",), 10 * GIB, "bf16", "sdpa", "lm_head", has_liger=False)
    with pytest.raises(ConfigError, match=r"strategy=auto: single takes \d+\.\d GiB of 10\.0 GiB"):
        choice(busy, LLAMA3_8B, strategy="auto", num_processes="auto")


def checkpoints(gib: float, **changes: Any) -> tuple[str, bool]:
    one_gpu = Machine("cuda", ("0",), int(gib * GIB), "bf16", "torch_varlen", "lm_head", has_liger=False)
    params = with_processes(sft_params(num_processes="auto", **changes), 1)
    found = choose_backend(params, one_gpu, LLAMA3_8B, Batch(8192, 4096))
    return found.strategy, found.activation_checkpointing


def test_activations_are_recomputed_only_if_nothing_fits_otherwise() -> None:
    assert checkpoints(79, strategy="auto") == ("single", False)
    assert checkpoints(40, strategy="auto") == ("single", True)
    assert checkpoints(40, strategy="zero2") == ("zero2", True)
    assert checkpoints(40, strategy="zero2", activation_checkpointing=False) == ("zero2", False)
    assert checkpoints(79, strategy="zero2", activation_checkpointing=True) == ("zero2", True)
    with pytest.raises(ConfigError, match="strategy=auto: single takes"):
        checkpoints(10, strategy="auto")
    with pytest.raises(ConfigError, match="strategy=auto: single takes"):
        checkpoints(40, strategy="auto", activation_checkpointing=False)


def test_a_model_whose_memory_cannot_be_estimated_needs_an_explicit_strategy() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 768}
    params = with_processes(sft_params(strategy="zero2"), 2)
    assert not choose_backend(params, TWO_GPUS, gpt2, Batch(10, 5)).activation_checkpointing
    with pytest.raises(ConfigError, match="only for Llama-like models"):
        choose_backend(params.model_copy(update={"strategy": "auto"}), TWO_GPUS, gpt2, Batch(10, 5))


@pytest.mark.parametrize(
    ("has_liger", "changes", "used"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"use_liger_kernel": False}, False),
        (True, {"torch_compile": True}, False),
    ],
)
def test_liger_is_used_if_available(has_liger: bool, changes: dict[str, Any], used: bool) -> None:  # noqa: FBT001
    machine = replace(TWO_GPUS, has_liger=has_liger)
    assert choose_backend(with_processes(sft_params(**changes), 2), machine).use_liger_kernel is used


def test_choosing_a_backend_does_not_import_torch() -> None:
    program = "import sys, tasks.sft.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
