"""Every causal architecture trains as in plain transformers, or is refused for a true reason beforehand.

`make test-architectures` runs the whole table and writes docs/architectures.md.
"""

import itertools
import os
from pathlib import Path

import pytest

from nightshift.core.errors import ConfigError, DataError
from tasks.base import load, save
from tests.helpers.architectures import ARCHITECTURES, make_architecture
from tests.helpers.cells import LAYOUTS, run_cell
from tests.helpers.checkouts import ROOT

PAGE = ROOT / "docs" / "architectures.md"
# Refused when packed: the model mixes the examples of one row. Each with the reason in the message.
MIXES = "packed examples attend to each other"
CONVOLUTION = "can't keep packed sequences apart without `causal_conv1d`"
PACKED_REFUSED = {
    "falcon": MIXES,
    "opt": MIXES,
    "bloom": MIXES,
    "mamba": MIXES,
    "recurrent_gemma": MIXES,
    "gpt_oss": MIXES,
    "lfm2": CONVOLUTION,
    "falcon_h1": CONVOLUTION,
    "granitemoehybrid": CONVOLUTION,
    "qwen3_next": CONVOLUTION,
}
BASE_REFUSED = {"mistral3": "Unrecognized configuration class"}
SHORT = ("llama", "falcon", "gpt_neox", "gemma3", "qwen3_moe", "lfm2")
KINDS = {"LoRA": "lora", "full": None}


def run(name: str, kind: str, layout: str, folder: Path) -> str:
    """Run a cell of the table, and return `ok`, or the reason for which it is refused."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["NIGHTSHIFT_HOME"] = str(folder / "state")
    source = make_architecture(name, folder / "source")
    try:
        save(*load(str(source)), "float32", folder / "base")
        run_cell(folder / "base", folder, KINDS[kind], layout)
    except (ConfigError, DataError) as err:
        return str(err)
    return "ok"


def require_expected(name: str, layout: str, found: str) -> None:
    """Require the result of a cell to be the expected one."""
    if name in BASE_REFUSED:
        assert BASE_REFUSED[name] in found
    elif layout == "packed" and name in PACKED_REFUSED:
        assert PACKED_REFUSED[name] in found
        assert "set pack.packing to false" in found
    else:
        assert found == "ok"


@pytest.mark.parametrize("name", SHORT)
def test_an_architecture_trains_as_in_plain_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path))
    for kind, layout in [("LoRA", "packed"), ("full", "micro-batch 2")]:
        require_expected(name, layout, run(name, kind, layout, tmp_path / kind))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_table_of_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path))
    cells: dict[tuple[str, str, str], str] = {}
    faults = []
    for name, kind, layout in itertools.product(ARCHITECTURES, KINDS, LAYOUTS):
        try:
            cells[name, kind, layout] = run(name, kind, layout, tmp_path / f"{name}-{kind}-{layout}")
            require_expected(name, layout, cells[name, kind, layout])
        except Exception as err:  # noqa: BLE001 - all faults are reported at once
            faults.append(f"{name} {kind} {layout}: {type(err).__name__}: {str(err)[:300]}")
    assert not faults, "\n".join(faults)
    PAGE.write_text(PAGE.read_text(encoding="utf-8").partition("| ")[0] + format_table(cells), "utf-8")


def format_table(cells: dict[tuple[str, str, str], str]) -> str:
    """Format the table of docs/architectures.md."""
    columns = list(itertools.product(KINDS, LAYOUTS))
    head = ["architecture", *(f"{kind}, {layout}" for kind, layout in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ARCHITECTURES:
        words = ["ok" if cells[name, *column] == "ok" else "refused" for column in columns]
        lines.append("| " + " | ".join([name, *words]) + " |")
    return "\n".join(lines) + "\n"
