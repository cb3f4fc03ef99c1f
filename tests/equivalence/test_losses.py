"""Losses do not depend on how a training run is split into micro-batches and processes.

Every step trains on all examples, so row order does not matter. The runs differ only in the
micro-batches and processes that compute the same sum.
"""

from pathlib import Path
from typing import Any

import pytest

from nightshift.core.ports import free_port
from tests.helpers.sft import history, make_folder, run_sft, start_sft

PACKED = ((0, 1), (2, 3), (4, 5), (6, 7))
ALONE = tuple((i,) for i in range(8))
# Adam divides by the root of a running sum that may be near 0, which amplifies gradient errors of 1e-7.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return make_folder(tmp_path_factory.mktemp("packed"), tiny_base, PACKED)


@pytest.fixture(scope="module")
def expected(packed: Path, clean_environment: dict[str, str]) -> list[float]:
    """Return the losses of one process with one forward pass per step."""
    done = run_sft(packed, clean_environment, "reference")
    assert done.returncode == 0, done.stdout
    losses = history(packed, "reference")
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    return losses


TWO = {"num_processes": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("accumulated", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        pytest.param("compiled", {"torch_compile": True}, marks=pytest.mark.long),
        pytest.param("ddp", {"strategy": "ddp", **TWO}, marks=pytest.mark.long),
        pytest.param("zero0", {"strategy": "zero0", **TWO}, marks=pytest.mark.long),
        pytest.param("zero1", {"strategy": "zero1", **TWO}, marks=pytest.mark.long),
        pytest.param(
            "offloaded", {"strategy": "zero2", "offload_optimizer": "cpu", **TWO}, marks=pytest.mark.long
        ),
        (
            "zero2",
            {"strategy": "zero2", **TWO, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        ),
        pytest.param("zero3", {"strategy": "zero3", **TWO}, marks=pytest.mark.long),
        ("fsdp2", {"strategy": "fsdp2", **TWO}),
    ],
)
def test_losses_do_not_depend_on_strategy_or_micro_batches(
    packed: Path, expected: list[float], clean_environment: dict[str, str], name: str, changes: dict[str, Any]
) -> None:
    done = run_sft(packed, clean_environment, name, **changes)
    assert done.returncode == 0, done.stdout
    assert history(packed, name) == pytest.approx(expected, rel=TOLERANCE)


def test_losses_do_not_depend_on_packing(
    tmp_path: Path, expected: list[float], tiny_base: Path, clean_environment: dict[str, str]
) -> None:
    folder = make_folder(tmp_path, tiny_base, ALONE)
    done = run_sft(folder, clean_environment, "alone", per_device_train_batch_size=8)
    assert done.returncode == 0, done.stdout
    assert history(folder, "alone") == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_losses_do_not_depend_on_the_number_of_machines(
    packed: Path, expected: list[float], clean_environment: dict[str, str], strategy: str
) -> None:
    (packed / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    state = f"machines-{strategy}"
    machines = [
        start_sft(
            packed,
            {**clean_environment, **together, "NODE_RANK": str(node)},
            state,
            strategy=strategy,
            hostfile="hosts",
            **TWO,
        )
        for node in range(2)
    ]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert history(packed, state) == pytest.approx(expected, rel=TOLERANCE)
    (folder,) = (packed / state / "checkpoints").iterdir()
    assert {path.name for path in folder.glob("job*.json")} == {"job.json", "job-1.json"}
