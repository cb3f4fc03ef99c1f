"""Handling of nvidia-smi output, on a machine without nvidia-smi."""

import subprocess
from pathlib import Path

import pytest

from infra.cli import plan
from infra.cli.plan import Devices, find_devices

REPAIR = "; GPUs of this machine are unusable until the driver is repaired"
ASSUMED = "assuming torch can use it"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path for nvidia-smi in a PATH without other programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(plan, "cpu_has_bf16", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia-smi"


def answer(driver: Path, script: str) -> Devices:
    driver.write_text(f"#!/bin/sh\n{script}\n")
    driver.chmod(0o755)
    return find_devices()


@pytest.mark.parametrize(
    ("lines", "memory", "bf16", "source"),
    [
        (
            "NVIDIA H100 80GB HBM3, 81559, 9.0",
            81559,
            "bf16",
            "NVIDIA H100 80GB HBM3, as reported by nvidia-smi; ",
        ),
        (
            "Tesla V100-SXM2-16GB, 16384, 7.0",
            16384,
            "no bf16",
            "Tesla V100-SXM2-16GB, as reported by nvidia-smi; ",
        ),
        ("NVIDIA A100, 40GB, 40960, 8.0", 40960, "bf16", "NVIDIA A100, 40GB, as reported by nvidia-smi; "),
        (
            "NVIDIA GB10, [N/A], 12.1",
            None,
            "bf16",
            "NVIDIA GB10, as reported by nvidia-smi; memory unknown, so fit is not checked; ",
        ),
        (
            "Orin (nvgpu), [Not Supported], [Not Supported]",
            None,
            "bf16",
            "Orin (nvgpu), as reported by nvidia-smi; memory unknown, so fit is not checked; "
            "compute capability unknown, so bf16 is assumed; ",
        ),
        ("NVIDIA L4, N/A, 8.9", None, "bf16", "NVIDIA L4, as reported by nvidia-smi; memory unknown"),
        (
            "NVIDIA L4, [Unknown Error], 8.9",
            None,
            "bf16",
            "NVIDIA L4, as reported by nvidia-smi; memory unknown",
        ),
        ("NVIDIA L4, 0, 8.9", None, "bf16", "NVIDIA L4, as reported by nvidia-smi; memory unknown"),
        ("NVIDIA L4, 1.2.3, 8.9", None, "bf16", "NVIDIA L4, as reported by nvidia-smi; memory unknown"),
        ("a warning\n\nNVIDIA L4, 23034, 8.9\nNVIDIA L4, 23034, 8.9", 23034, "bf16", "2 x NVIDIA L4, as "),
    ],
)
def test_a_device_is_parsed_from_its_line(
    driver: Path, lines: str, memory: int | None, bf16: str, source: str
) -> None:
    numbered = [
        f"{line}, {i}, GPU-{i}" if line.count(", ") > 1 else line for i, line in enumerate(lines.splitlines())
    ]
    machine = answer(driver, f"printf '%s\\n' '{chr(10).join(numbered)}'")
    assert (machine.device, machine.has_bf16) == ("cuda", bf16 == "bf16")
    assert machine.memory == (None if memory is None else memory * 2**20)
    assert machine.source.startswith(source)
    assert machine.source.endswith(ASSUMED)


@pytest.mark.parametrize(
    ("visible", "gpus", "memory"),
    [
        ("1", 1, 40960),
        ("GPU-b2", 1, 81559),
        ("2, 0", 2, 81559),
        ("0,9,1", 1, 23034),
        ("MIG-7c", 1, 23034),
        ("", 0, None),
        ("-1", 0, None),
        ("7", 0, None),
    ],
)
def test_only_visible_devices_count(
    driver: Path, monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int, memory: int | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    lines = (
        "NVIDIA L4, 23034, 8.9, 0, GPU-a0f",
        "NVIDIA A100, 40960, 8.0, 1, GPU-a1f",
        "NVIDIA H100, 81559, 9.0, 2, GPU-b2f",
    )
    found = answer(driver, f"printf '%s\\n' {' '.join(map(repr, lines))}")
    assert found.gpus == gpus
    assert found.memory == (None if memory is None else memory * 2**20)
    if not gpus:
        assert (found.device, found.source) == (
            "cpu",
            f"nvidia-smi lists no GPU of CUDA_VISIBLE_DEVICES={visible}",
        )


def test_a_device_counts_despite_a_nonzero_exit_code(driver: Path) -> None:
    machine = answer(
        driver, "echo 'NVIDIA L4, 23034, 8.9, 0, GPU-1'; echo 'WARNING: infoROM is corrupted' >&2; exit 14"
    )
    assert machine.memory == 23034 * 2**20


@pytest.mark.parametrize(
    ("script", "source"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'\n"
            "echo 'NVML library version: 550.54'\nexit 18",
            "nvidia-smi exited with code 18: Failed to initialize NVML: Driver/library version "
            "mismatch NVML library version: 550.54",
        ),
        ("echo 'No devices were found'", "nvidia-smi exited with code 0: No devices were found"),
        (
            "echo 'Field \"compute_cap\" is not a valid field to query.' >&2; exit 2",
            'nvidia-smi exited with code 2: Field "compute_cap" is not a valid field to query.',
        ),
        (
            "echo 'It failed, for the driver, which is old, is silent'; exit 9",
            "nvidia-smi exited with code 9: It failed, for the driver, which is old, is silent",
        ),
        ("exit 0", "nvidia-smi exited with code 0: no output"),
        ("exit 255", "nvidia-smi exited with code 255: no output"),
        ("kill -SEGV $$", "nvidia-smi exited with code -11: no output"),
        ("printf '\\377\\376, \\000'", "nvidia-smi exited with code 0: \ufffd\ufffd, \0"),
        (
            "echo 'name, memory.total [MiB], compute_cap, index, uuid'",
            "nvidia-smi exited with code 0: name, memory",
        ),
        (
            f"echo 'NVIDIA L4, {'9' * 400}, 8.9, 0, GPU-1'",
            "nvidia-smi exited with code 0: NVIDIA L4, 999",
        ),
    ],
)
def test_output_without_a_device_is_reported_with_a_remedy(driver: Path, script: str, source: str) -> None:
    machine = answer(driver, script)
    assert (machine.device, machine.memory) == ("cpu", None)
    assert machine.source.startswith(source)
    assert machine.source.endswith(REPAIR)


def test_a_hung_driver_times_out(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DRIVER_SECONDS", 0.3)
    # Its child process keeps the pipe open.
    machine = answer(driver, "/bin/sleep 5; echo 'NVIDIA L4, 23034, 8.9, 0, GPU-1'")
    assert (machine.device, machine.source) == (
        "cpu",
        f"nvidia-smi did not respond within 0.3 seconds{REPAIR}",
    )


def test_a_hung_driver_that_cannot_be_killed_times_out(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DRIVER_SECONDS", 0.3)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda _: None)
    assert answer(driver, "/bin/sleep 3").device == "cpu"


def test_without_a_working_nvidia_smi_the_cpu_is_used(driver: Path) -> None:
    assert (find_devices().device, find_devices().source) == ("cpu", "nvidia-smi is not installed")
    driver.write_bytes(b"\x7fELF no program")
    driver.chmod(0o755)
    assert find_devices().source == f"nvidia-smi cannot be run: Exec format error{REPAIR}"
    driver.chmod(0o644)
    assert find_devices().device == "cpu"
