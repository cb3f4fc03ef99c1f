"""Training continues a version on its own base and with its own shape only."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.files import write_json
from nightshift.core.paths import BASE_RECORD, START_RECORD
from nightshift.registry.start import Start, find_misfits, read_start

# Digest of a base of no files.
NO_FILES = "b16809a7ef22e4b9e996699ad760b2b7"
SECTION = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "use_dora": False, "use_rslora": False}
CONFIG = {"r": 8, "lora_alpha": 16, "use_dora": False, "use_rslora": False}


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (Start(3, "a" * 64, NO_FILES, "package:first"), None),
        (
            Start(3, "a" * 64, "b" * 32, "package:first"),
            f"version 3 was trained on another base: package:first, digest {'b' * 32}",
        ),
        (Start(reason="there was no champion yet"), "there was no champion yet"),
        (Start(), None),
    ],
)
def test_a_version_is_the_start_on_its_own_base_only(chosen: Start, reason: str | None) -> None:
    write_json(START_RECORD, asdict(chosen))
    write_json(BASE_RECORD, {"files": {}})
    found = read_start()
    assert found.reason == reason
    assert found.version == (3 if chosen.base == NO_FILES else None)
    assert found.digest == (chosen.digest if found.version else None)


@pytest.mark.parametrize(
    ("changes", "config", "problem"),
    [
        ({}, CONFIG, None),
        ({"adapter": "qlora"}, CONFIG, None),
        ({"adapter": None}, None, None),
        (
            {"lora_r": 16},
            CONFIG,
            "sft.lora_r is 16, but version 3, from which training starts (sft.start_from: ",
        ),
        ({"use_dora": True}, CONFIG, "sft.use_dora is True, but version 3"),
        ({"adapter": None}, CONFIG, "sft.adapter is null, but version 3"),
        ({}, None, "sft.adapter is lora, but version 3"),
        ({}, {"r": 8, "lora_alpha": 16}, None),
        (
            {},
            CONFIG | {"alpha_pattern": {"q_proj": 4}},
            "version 3, from which training starts (sft.start_from: ",
        ),
    ],
)
def test_what_decides_the_meaning_of_the_weights_must_be_the_same(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any] | None, problem: str | None
) -> None:
    if config:
        write_json(tmp_path / "adapter_config.json", config)
    found = list(find_misfits(tmp_path, 3, SECTION | changes))
    assert len(found) == (0 if problem is None else 1)
    assert all(line.startswith(str(problem)) for line in found)


def test_the_remedy_has_the_value_of_the_version(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", CONFIG)
    (line,) = find_misfits(tmp_path, 3, SECTION | {"lora_alpha": 32})
    assert line == (
        "sft.lora_alpha is 32, but version 3, from which training starts (sft.start_from: champion), has 16; "
        "set the same, or set sft.start_from to base, which trains a new model"
    )
    (line,) = find_misfits(tmp_path, 3, SECTION | {"adapter": None})
    assert "has an adapter; set it to lora or qlora, or set" in line
