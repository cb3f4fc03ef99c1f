"""A version is rebuilt as it was trained, regardless of what this machine would choose."""

from pathlib import Path
from typing import Any

from infra.cli.reproduce import differences, pin_processes
from nightshift.core.files import write_json


def ran(processes: int, kernel: str, device: str = "0") -> dict[str, Any]:
    """Return the contents of effective.json."""
    return {
        "num_processes": {"requested": "auto", "effective": processes},
        "attn_implementation": {"requested": "auto", "effective": kernel},
        "devices": {"requested": "all", "effective": [device]},
        "trained": {"weights": 4, "tensors": 2, "modules": {"q_proj": 1}},
        "strategy_reason": "set in params.yaml",
    }


def test_the_number_of_processes_is_that_of_the_version(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("sft:\n  num_processes: auto\n")
    pin_processes(params, {})
    assert params.read_text() == "sft:\n  num_processes: auto\n"
    pin_processes(params, ran(8, "sdpa"))
    assert params.read_text() == "sft:\n  num_processes: 8\n"


def test_different_settings_are_listed(tmp_path: Path) -> None:
    write_json(tmp_path / "data/sft/effective.json", ran(8, "sdpa_per_example", "3"))
    assert differences(ran(8, "torch_varlen"), tmp_path) == [
        "attn_implementation sdpa_per_example instead of torch_varlen"
    ]
    assert differences({}, tmp_path) == []
